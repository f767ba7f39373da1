// The texts of the page in English and Chinese. `{}` stands for a value.

export const WORDS = {
  en: {
    other: "中文", menu: "Chats", fresh: "New chat", chats: "Chats", settings: "Settings", close: "Close",
    send: "Send", stop: "Stop", hint: "Write a message", hintKeys: "Enter sends, Shift+Enter begins a new line, Escape stops an answer",
    copy: "Copy", copied: "Copied", notCopied: "The browser refused to copy; select the text instead.",
    again: "Regenerate", edit: "Edit", remove: "Delete", more: "Continue", retry: "Try again", undo: "Undo",
    save: "Save", saveSend: "Save and send", cancel: "Cancel", rename: "Rename", title: "Title of the chat",
    exportOne: "Export this chat", exportAll: "Export all chats", untitled: "New chat",
    you: "You", model: "Model", thinking: "Thinking …", thought: "Reasoning",
    temperature: "Temperature", temperatureHelp: "0 always takes the most likely token; empty: {}",
    top_p: "Top p", top_pHelp: "Share of probability to choose from; empty: 1",
    seed: "Seed", seedHelp: "The same seed repeats an answer; empty: random",
    max_tokens: "Maximum length", max_tokensHelp: "New tokens of an answer; empty: what the context leaves",
    system: "System message", earlier: "Send the earlier messages of the chat with each message",
    key: "API key", keyHelp: "Only if the server asks for one; kept until this tab is closed",
    theme: "Colours", themeSystem: "as the system", themeLight: "light", themeDark: "dark",
    hello: "Ask a question.", examples: "Questions like those of its training:",
    kept: "Chats are kept in this browser only.",
    single: "This model was trained on single questions, so each message is sent without the earlier ones (see Settings).",
    omitted: "The {} messages above no longer fit into the context of the model and are not sent.",
    stopped: "Stopped.", length: "The answer reached its limit of tokens.", silent: "The model gave an empty answer.",
    lost: "The server cannot be reached.", cut: "The connection ended before the answer did.",
    tooLong: "The message does not fit into the context of {} tokens. Shorten it.",
    wait: "An answer is being written. Escape stops it; your text stays here.",
    deletedTurn: "Deleted.", deletedChat: "Deleted “{}”.", replaced: "The earlier version was replaced.",
    dropped: "The browser's storage is full: the oldest chat, “{}”, was removed.",
    unkept: "The browser's storage is full: this chat is not kept. Export it.",
    nothing: "There is no answered message to export.", wrong: "Correct the value of: {}",
    tokens: "{} tokens", speed: "{} tokens/s", prompt: "{} in the prompt", first: "first after {} s", answered: "Answer: {}",
  },
  zh: {
    other: "English", menu: "对话列表", fresh: "新对话", chats: "对话列表", settings: "设置", close: "关闭",
    send: "发送", stop: "停止", hint: "输入消息", hintKeys: "回车发送，Shift+回车换行，Esc 停止回答",
    copy: "复制", copied: "已复制", notCopied: "浏览器不允许复制，请手动选择文字。",
    again: "重新生成", edit: "编辑", remove: "删除", more: "继续", retry: "重试", undo: "撤销",
    save: "保存", saveSend: "保存并发送", cancel: "取消", rename: "重命名", title: "对话标题",
    exportOne: "导出本对话", exportAll: "导出全部对话", untitled: "新对话",
    you: "你", model: "模型", thinking: "正在思考……", thought: "思考过程",
    temperature: "温度", temperatureHelp: "0 表示总是选最可能的 token；留空为 {}",
    top_p: "Top p", top_pHelp: "从累计概率不超过该值的 token 中选；留空为 1",
    seed: "随机种子", seedHelp: "相同的种子得到相同的回答；留空为随机",
    max_tokens: "最大长度", max_tokensHelp: "一次回答最多生成的 token 数；留空则用完剩余上下文",
    system: "系统消息", earlier: "每条消息都附带本对话之前的消息",
    key: "API 密钥", keyHelp: "服务器要求时才需要；关闭本标签页后清除",
    theme: "颜色", themeSystem: "跟随系统", themeLight: "浅色", themeDark: "深色",
    hello: "请提问。", examples: "与训练数据类似的问题：",
    kept: "对话只保存在本浏览器中。",
    single: "该模型只用单轮问答训练过，因此每条消息单独发送，不附带之前的消息（可在设置中更改）。",
    omitted: "以上 {} 条消息已超出模型的上下文长度，不再发送给模型。",
    stopped: "已停止。", length: "回答达到了 token 上限。", silent: "模型的回答为空。",
    lost: "无法连接服务器。", cut: "回答尚未结束，连接已断开。",
    tooLong: "这条消息超出了 {} 个 token 的上下文长度，请缩短。",
    wait: "正在生成回答，按 Esc 停止；输入的文字会保留。",
    deletedTurn: "已删除。", deletedChat: "已删除“{}”。", replaced: "之前的版本已被替换。",
    dropped: "浏览器存储空间已满，最早的对话“{}”已被移除。",
    unkept: "浏览器存储空间已满，本对话无法保存，请导出。",
    nothing: "没有可以导出的问答。", wrong: "请更正：{}",
    tokens: "{} 个 token", speed: "{} token/秒", prompt: "提示词 {} 个", first: "首个 token {} 秒", answered: "回答：{}",
  },
};

let language = "en";

export function speak(chosen) {
  language = chosen in WORDS ? chosen : navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = say(node.dataset.text);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", say(node.dataset.label));
  return language;
}

export const other = () => language === "en" ? "zh" : "en";

export function say(name, ...values) {
  return WORDS[language][name].replaceAll("{}", () => values.shift());
}

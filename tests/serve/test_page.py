"""If this breaks: the chat page loses what someone has typed, stops an answer that should go on, sends an answer's markup to the
browser, or cannot be used on a phone, in the dark, without a mouse or in Chinese. A real Chromium against a real server.

The model is a chain: each token has one successor, so its answers are known. A question with "forever" gets one without an end.
"""

import json
import shutil
import time
from itertools import pairwise

import pytest

from lit_llm.data.records.formats import convert

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and chromedriver are not installed")

CONTEXT = 8192
EVIL = "<img src=x onerror=hit=1><script>hit=2</script> [a](javascript:hit=3) ![b](https://example.org/p.png) \u202egnp.exe\u202c"
TABLE = "\n\n| fruit | price |\n|:--|--:|\n| pear | 3 |\n| " + "long_word_" * 30 + " | 4 |"
CODE = "\n\n```python\nfor _ in range(3):\n    print('<b>')" + " # comment" * 30 + "\n```"
LIST = "\n\n- one\n- **two**\n  1. inner\n\n"
ANSWER = ["<think>I look", " it up.</think>", "A *pear*", " costs `3`.", TABLE, CODE, LIST, EVIL]
ENDLESS = " tick"
TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content }}
{%- if not (loop.last and continue_final_message is defined and continue_final_message) %}{{ '<|im_end|>\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant' + ('~' if 'forever' in messages[-1].content else '\n') }}
{%- endif -%}"""


@pytest.fixture(scope="module")
def page_model(tiny_tokenizer, tmp_path_factory):
    """A Llama whose only layer adds nothing: the embedding of the last token decides the next one."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("page") / "pears"
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    typed = tokenizer(ENDLESS * 2, add_special_tokens=False)["input_ids"][-1]      # an answer that is sent back is plain text
    tokenizer.add_tokens([*ANSWER, ENDLESS])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    size, width = len(tokenizer), len(tokenizer) // 8 * 8 + 8
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=CONTEXT, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, tie_word_embeddings=False))
    ids = tokenizer.convert_tokens_to_ids
    chain = [ids("\u010a"), *map(ids, ANSWER), ids("<|im_end|>")]
    loop = [ids("~"), ids(ENDLESS), ids(ENDLESS)]
    again = [typed, ids(ENDLESS)]
    with torch.no_grad():
        for weight in (model.lm_head.weight, model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        for now, following in [*pairwise(chain), *pairwise(loop), again]:
            model.lm_head.weight[following, now] = 2.0
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nwidget:\n- messages:\n  - {role: user, content: 'What does a pear cost?'}\n"
                                      "- text: 梨多少钱？\nturns: 3\n---\n# pears\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def address(page_model, start_server):
    return start_server("--model", page_model, "--threads", "1").url


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--lang=en", "--window-size=1000,800"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    yield driver
    driver.quit()


class Page:
    """The page as a person sees it."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        self.until(lambda: self.all(selector), f"no {selector}")
        return self.all(selector)[0]

    def js(self, code, *values):
        return self.driver.execute_script(code, *values)

    def until(self, true, why="it never came true", seconds=20):
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, (why, self.js("return document.body.innerText")[-800:])
            time.sleep(0.03)

    def keys(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def open(self):
        self.driver.get(self.address + "/")
        self.until(lambda: self.one("#model").text == "pears")

    def type(self, text):
        box = self.one("#box")
        self.js("arguments[0].focus()", box)
        box.send_keys(text)

    def paste(self, text):
        self.js("""const box = document.getElementById("box"); box.value = arguments[0];
                box.dispatchEvent(new Event("input", {bubbles: true}));""", text)

    def ask(self, text):
        before = len(self.all(".assistant"))
        self.type(text + "\n")
        self.until(lambda: len(self.all(".assistant")) > before or self.all(".note.bad:not([hidden])"))

    def done(self):
        self.until(lambda: self.one("#send").text in ("Send", "发送"))

    def exchange(self, text):
        self.ask(text)
        self.done()

    def press(self, text, within="body"):
        buttons = [button for button in self.all(f"{within} button") if button.text == text]
        assert buttons, (text, [button.text for button in self.all(f"{within} button")])
        buttons[-1].click()

    def questions(self):
        return [node.text for node in self.all(".user .body")]

    def bodies(self):
        """What the page has sent to the chat route, since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [json.loads(request["postData"]) for request in sent if request["url"].endswith("/v1/chat/completions")]

    def screen(self, width, height, mobile=False):
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                    {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile})


@pytest.fixture
def page(browser, address):
    page = Page(browser, address)
    page.screen(1000, 800)
    browser.get(address + "/page/words.js")         # of the same origin, and without the page's code
    page.js("localStorage.clear(); sessionStorage.clear()")
    page.open()
    page.bodies()
    yield page
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "net::" not in entry["message"]
              and not any(harmless in entry["message"] for harmless in ("status of 400", "/tokenize"))]
    assert not errors


def test_an_answer_is_rendered_counted_and_announced(page):
    assert page.one("#box").get_attribute("id") == page.driver.switch_to.active_element.get_attribute("id")
    page.exchange("What does a pear cost?")
    (answer,) = page.all(".assistant")
    assert answer.find_element("css selector", "em").text == "pear"
    assert answer.find_element("css selector", "p code").text == "3"
    assert [cell.text for cell in answer.find_elements("css selector", "td")][:2] == ["pear", "3"]
    assert page.js("return getComputedStyle(document.querySelector('td + td')).textAlign") in ("end", "right")
    code = answer.find_element("css selector", "pre code").get_attribute("textContent")
    assert code == CODE.strip().removeprefix("```python\n").removesuffix("\n```")
    assert page.js("return [...document.querySelectorAll('.assistant li')].map(node => node.firstChild.textContent)") == ["one", "two", "inner"]
    thought = page.one(".thought")
    assert (thought.get_attribute("open"), thought.find_element("css selector", "div").is_displayed()) == (None, False)
    assert thought.find_element("css selector", "div").get_attribute("textContent") == "I look it up."
    assert answer.find_element("css selector", ".figures").text.startswith(f"{len(ANSWER) + 1} tokens · ")
    assert "tokens/s" in answer.find_element("css selector", ".figures").text
    assert page.one("#announcer").get_attribute("textContent").startswith("Answer: A *pear* costs `3`.")
    assert page.one("#announcer").get_attribute("aria-live") == "polite"
    page.js("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve(); }")
    page.press("Copy", ".code")
    assert page.js("return copied") == code
    (sent,) = page.bodies()
    assert "temperature" not in sent                # the server's default is the page's
    assert page.one("#temperature").get_attribute("value") == ""


def test_enter_during_an_answer_leaves_it_alone_and_escape_stops_it(page):
    page.ask("forever")
    page.type("my next question\n")
    time.sleep(0.3)
    assert page.one("#send").text == "Stop"
    assert "Escape stops it" in page.one("#notice").text
    page.keys("\ue00c")
    page.done()
    assert page.one(".assistant .note").text == "Stopped."
    assert page.one("#box").get_attribute("value") == "my next question"
    written = lambda: page.js("return document.querySelector('.markdown').textContent")        # noqa: E731
    first = written()
    assert first.startswith(" tick tick")
    page.one("#box").clear()
    page.press("Continue", ".assistant")            # continues the same answer, and stops by the button
    page.until(lambda: page.js("return document.querySelector('.markdown').textContent.length") > len(first))
    page.one("#send").click()
    page.done()
    assert (len(page.all(".assistant")), written()[:len(first)]) == (1, first)
    assert set(written().split()) == {"tick"}
    assert page.one(".assistant .note").text == "Stopped."


def test_edit_regenerate_delete_and_undo(page):
    page.exchange("first")
    page.exchange("second")
    page.bodies()
    page.press("Regenerate")
    page.until(lambda: page.one("#send").text == "Send" and len(page.all(".assistant")) == 2 and page.all(".again"))
    (sent,) = page.bodies()
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "user"]
    assert "<think>" not in sent["messages"][1]["content"]
    page.press("Edit", ".user")
    editor = page.one(".editor textarea")
    editor.clear()
    editor.send_keys("better")
    page.press("Save and send", ".editor")
    page.until(lambda: page.questions() == ["first", "better"] and page.one("#send").text == "Send" and page.all(".again"))
    page.press("Undo", "#notice")
    assert page.questions() == ["first", "second"]
    page.press("Delete", ".turn")
    assert page.questions() == ["first"]
    page.press("Undo", "#notice")
    assert page.questions() == ["first", "second"]
    page.press("Edit", ".assistant")                # an answer may be corrected, for a training record
    page.one(".editor textarea").send_keys(" Corrected.")
    page.press("Save", ".editor")
    assert "Corrected." in page.all(".assistant")[1].text


def test_a_full_context_leaves_out_the_oldest_turns_and_says_so(page):
    for number in range(4):
        page.paste(f"question {number} " + "pear " * 600)
        page.exchange("")
        assert not page.all(".note.bad:not([hidden])")
    assert page.one(".omitted").text.startswith("The ")
    sent = page.bodies()[-1]["messages"]
    assert (sent[0]["role"], sent[-1]["content"][:10]) == ("user", "question 3")
    assert len(sent) < 7
    assert len(page.questions()) == 4               # what is no longer sent is still shown
    page.open()
    assert page.one(".omitted")
    page.paste("x" * 9000)                          # nothing can be left out of this
    page.exchange("")
    assert f"does not fit into the context of {CONTEXT} tokens" in page.one(".note.bad:not([hidden])").text
    assert page.questions()[-1] == "x" * 9000
    page.exchange("short again")
    assert not page.all(".turn:last-child .note.bad:not([hidden])")
    assert "x" * 9000 not in str(page.bodies()[-1])


def test_an_answer_cannot_bring_markup_or_reorder_the_page(page):
    page.exchange("What does a pear cost?")
    page.exchange(EVIL)
    assert page.js("return window.hit") is None
    assert not page.all("#log img, #log script, #log iframe, #log [onerror], #log a[href^='javascript']")
    assert {link.get_attribute("href") for link in page.all("#log a")} == {"https://example.org/p.png"}
    assert {link.get_attribute("rel") for link in page.all("#log a")} == {"noopener noreferrer nofollow"}
    assert "\u202e" not in page.js("return document.body.innerText + document.title")
    assert {node.text for node in page.all("#log .hidden-character") if node.is_displayed()} == {"U+202E", "U+202C"}
    assert "<script>hit=2</script>" in page.all(".assistant .markdown")[0].text
    assert page.js("try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; }") == "TypeError"      # the policy
    page.driver.get_log("browser")


def test_chinese_throughout_and_its_input_methods(page):
    page.one("#language").click()
    assert (page.one("#send").text, page.one("#fresh").text) == ("发送", "新对话")
    assert page.js("return document.documentElement.lang") == "zh-CN"
    assert not set(page.js("return [...document.querySelectorAll('[data-text]')].filter(node => !node.textContent)"))
    cdp = page.driver.execute_cdp_cmd
    page.one("#box").click()
    cdp("Input.imeSetComposition", {"text": "li", "selectionStart": 2, "selectionEnd": 2})
    cdp("Input.dispatchKeyEvent", {"type": "rawKeyDown", "windowsVirtualKeyCode": 229, "key": "Enter", "code": "Enter"})
    cdp("Input.insertText", {"text": "梨多少钱？"})
    assert (page.questions(), page.one("#box").get_attribute("value")) == ([], "梨多少钱？")
    page.keys("\n")
    page.done()
    page.until(lambda: page.all(".assistant .figures"))
    assert page.questions() == ["梨多少钱？"]
    assert "个 token" in page.one(".assistant .figures").text
    page.open()                                     # the choice is kept
    assert page.one("#send").text == "发送"
    cdp("Emulation.setUserAgentOverride", {"userAgent": "test", "acceptLanguage": "zh-TW"})
    page.js("localStorage.clear()")
    page.open()
    assert page.one("#send").text == "发送"
    cdp("Emulation.setUserAgentOverride", {"userAgent": "", "acceptLanguage": "en"})


def settings_of(page):
    names = ("temperature", "top_p", "seed", "max_tokens", "system")
    return {name: page.one(f"#{name}").get_attribute("value") for name in names}


def test_a_reload_keeps_chat_draft_and_settings(page):
    page.press("Settings")
    wanted = {"temperature": "0.5", "top_p": "0.9", "seed": "7", "max_tokens": "4", "system": "Be brief."}
    for name, value in wanted.items():
        page.one(f"#{name}").send_keys(value)
    page.press("Close")
    page.exchange("What does a pear cost?")
    assert page.one(".assistant .note").text == "The answer reached its limit of tokens."
    page.type("half a thought")
    page.open()
    assert page.questions() == ["What does a pear cost?"]
    assert page.one(".markdown").text == "A pear costs 3."
    assert page.one("#box").get_attribute("value") == "half a thought"
    page.press("Settings")
    assert settings_of(page) == wanted
    page.press("Close")
    (sent,) = page.bodies()
    assert {name: sent[name] for name in ("temperature", "top_p", "seed", "max_tokens")} == {
        "temperature": 0.5, "top_p": 0.9, "seed": 7, "max_tokens": 4}
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}


def test_nothing_typed_is_lost_when_the_server_is_away(page):
    away = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", away | {"offline": True})
    page.exchange("an important question")
    assert page.one(".note.bad").text == "The server cannot be reached."
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", away | {"offline": False})
    page.open()
    assert page.questions() == ["an important question"]
    page.press("Try again")
    page.done()
    page.until(lambda: page.all(".assistant .figures"))
    assert not page.all(".note.bad:not([hidden])")


def test_several_chats(page):
    titles = lambda: [node.text for node in page.all("#chats .open")]       # noqa: E731
    page.exchange("about pears")
    page.press("New chat")
    page.type("a draft")
    assert page.questions() == []
    page.one("#box").clear()
    page.exchange("about plums")
    assert titles() == ["about plums", "about pears"]
    page.all("#chats .open")[1].click()
    assert page.questions() == ["about pears"]
    page.press("Rename", "#side")
    page.keys("Fruit", "\n")
    assert sorted(titles()) == ["Fruit", "about plums"]
    page.press("Delete", "#side")
    assert titles() == ["about plums"]
    page.press("Undo", "#notice")
    assert (sorted(titles()), page.questions()) == (["Fruit", "about plums"], ["about pears"])
    page.ask("forever")                             # an answer continues in its own chat while another is open
    page.press("about plums", "#side")
    assert page.questions() == ["about plums"]
    page.keys("\ue00c")
    page.done()
    page.open()
    page.press("Fruit", "#side")
    assert page.questions() == ["about pears", "forever"]


def test_a_key_is_asked_for_and_kept_in_this_tab_only(browser, page_model, start_server):
    """The question waits meanwhile; a wrong key is asked for again."""
    page = Page(browser, start_server("--model", page_model, "--threads", "1", "--api-key", "sesame").url)
    browser.get(page.address + "/")
    page.one("#settings[open]")
    page.press("Close")                             # without one
    page.one("#box").click()
    page.exchange("What does a pear cost?")
    page.one("#settings[open]")
    assert "API key" in page.one(".note.bad").get_attribute("textContent")
    page.one("#key").send_keys("sesam")
    page.press("Close")
    page.one("#settings[open]")
    page.one("#key").send_keys("e")
    page.press("Close")
    page.until(lambda: page.one("#model").text == "pears")
    assert not page.all("#notice.bad:not([hidden])")
    page.press("Try again", "#log")
    page.until(lambda: page.all(".assistant .figures"))
    assert page.questions() == ["What does a pear cost?"]
    page.open()                                     # a reload
    assert (page.questions(), page.all("#settings[open]")) == (["What does a pear cost?"], [])
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(page.address + "/")
    page.one("#settings[open]")                     # a key is not written to the disk
    assert page.js("return JSON.stringify(localStorage)").count("sesame") == 0
    browser.close()
    browser.switch_to.window(first)
    browser.get_log("browser")


def test_two_tabs_show_the_same_chats(page):
    titles = lambda: sorted(node.get_attribute("textContent") for node in page.all("#chats .open"))       # noqa: E731
    page.exchange("from the first")
    one = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.open()
    assert page.questions() == ["from the first"]
    page.press("New chat")
    page.exchange("from the second")
    two = page.driver.current_window_handle
    page.driver.switch_to.window(one)
    page.until(lambda: titles() == ["from the first", "from the second"])
    page.exchange("once more")                      # neither overwrites what the other has kept
    page.driver.switch_to.window(two)
    page.press("from the first", "#side")
    assert page.questions() == ["from the first", "once more"]
    page.exchange("and again")
    page.driver.switch_to.window(one)
    page.until(lambda: page.questions() == ["from the first", "once more", "and again"])
    page.driver.switch_to.window(two)
    page.driver.close()
    page.driver.switch_to.window(one)


def test_a_full_storage_drops_the_oldest_chat_and_says_so(page):
    page.js("""const old = {id: "old", title: "Old one", updated: 1, system: "", omitted: 0, messages: []};
      for (let size = 4000000; size > 10; size >>= 1) for (;;) {
        const more = {role: "user", text: "y".repeat(size)};
        try { localStorage.setItem("lit_llm.chat.old", JSON.stringify({...old, messages: [...old.messages, more]})); } catch { break; }
        old.messages.push(more);
      }""")
    page.exchange("z" * 300)
    page.until(lambda: "“Old one”, was removed" in page.one("#notice").text)
    page.open()
    assert len(page.questions()) == 1


def test_the_export_is_data_for_training(page, downloads):
    page.press("Settings")
    page.one("#system").send_keys("Be brief.")
    page.press("Close")
    page.exchange("What does a pear cost?")
    page.press("New chat")
    page.exchange("梨多少钱？")
    page.press("Export all chats")
    file = downloads / "chats.jsonl"
    page.until(file.is_file)
    first, second = [convert(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [message.role for message in first.messages] == ["system", "user", "assistant"]
    assert (first.messages[1].content, second.messages[1].content) == ("梨多少钱？", "What does a pear cost?")
    assert first.messages[2].content == "".join(ANSWER[2:])
    assert first.messages[2].reasoning_content == "I look it up."


def test_a_phone_scrolls_in_one_direction_only(page):
    page.exchange("What does a pear cost? " + "w" * 200)
    page.screen(340, 640, mobile=True)
    page.open()
    overflow = "return [document.documentElement.scrollWidth, document.querySelector('main').scrollWidth]"
    assert max(page.js(overflow)) <= 340
    assert page.js("return document.querySelector('pre').scrollWidth") > 340        # long lines scroll in their own box
    assert not page.one("#side").is_displayed()
    page.press("Chats", "header")
    assert page.one("#menu").get_attribute("aria-expanded") == "true"
    page.press("New chat", "#side")
    assert not page.one("#side").is_displayed()
    assert [button.text for button in page.all(".example")] == ["What does a pear cost?", "梨多少钱？"]
    page.press("Settings")
    assert page.js("return document.querySelector('dialog').getBoundingClientRect().right") <= 340
    assert max(page.js(overflow)) <= 340


LIGHT = """const lit = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => { v /= 255;
  return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const back = node => { for (; node; node = node.parentElement) { const c = getComputedStyle(node).backgroundColor;
  if (!/, 0\\)$/.test(c)) return c; } };
return [...document.querySelectorAll(arguments[0])].filter(node => node.textContent.trim() && node.offsetParent).map(node => {
  const [one, two] = [lit(getComputedStyle(node).color), lit(back(node))].sort((a, b) => b - a);
  return [node.className || node.tagName, (one + 0.05) / (two + 0.05), lit(back(node))]; })"""


def test_light_and_dark_can_be_read(page):
    """Contrast of WCAG AA, 4.5 to 1, of every text in both themes."""
    page.exchange("What does a pear cost?")
    for theme in ("light", "dark", "light"):
        if theme != "dark" or not page.js("return document.documentElement.dataset.theme === 'dark'"):
            page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
        texts = page.js(LIGHT, "h1, p, button:not(:disabled), td, th, code, .body, .figures, small, summary, a, li")
        assert len(texts) > 20
        assert [text for text in texts if text[1] < 4.5] == []
        assert {text[2] > 0.5 for text in texts if text[0] == "H1"} == {theme == "light"}
    page.press("Settings")
    page.one("#theme").send_keys("dark")
    assert page.js(LIGHT, "h1")[0][2] < 0.1
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_keyboard_alone_suffices(page):
    focused = lambda: page.driver.switch_to.active_element      # noqa: E731
    page.keys("What does a pear cost?", "\n")
    page.done()
    page.until(lambda: page.all(".assistant .figures"))
    page.keys("\ue008\ue004\ue000")                 # Shift+Tab goes back to the last answer's buttons
    names = []
    for _ in range(4):
        names.append(focused().text)
        page.keys("\ue008\ue004\ue000")
    assert names == ["Delete", "Edit", "Regenerate", "Copy"]
    page.js("document.querySelector('.user .edit').focus()")
    page.keys("\n")
    assert focused().get_attribute("value") == "What does a pear cost?"
    page.keys("\ue00c")
    assert focused().text == "Edit"
    page.js("document.getElementById('options').focus()")
    page.keys("\n")
    assert focused().find_elements("xpath", "ancestor-or-self::dialog")
    page.keys("\ue00c")
    assert focused().get_attribute("id") == "options"
    for element in page.all("button, input, textarea, select"):
        if element.is_displayed():
            assert element.accessible_name, element.get_attribute("outerHTML")

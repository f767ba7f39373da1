// Markdown of a model's answer as DOM nodes. Texts become text nodes, never HTML, so an answer cannot bring markup of its own.

const REORDERING = /([\u202a-\u202e\u2066-\u2069])/;          // characters that reorder the text around them
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +(.*)|)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const DELIMITERS = /^ {0,3}\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const DEEPEST = 12;                                 // levels of quotes and lists; deeper ones are shown as text
const LONGEST_INLINE = 20000;                       // characters of a paragraph that are searched for emphasis and links

export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// A text, in which characters that reorder text are shown by their number instead of being obeyed.
export function plain(text) {
  const fragment = document.createDocumentFragment();
  for (const part of text.split(REORDERING)) {
    if (!part) continue;
    const hidden = REORDERING.test(part);
    fragment.append(hidden ? make("span", { className: "hidden-character",
      textContent: "U+" + part.codePointAt(0).toString(16).toUpperCase() }) : part);
  }
  return fragment;
}

// Renders a growing text: blocks that have not changed keep their nodes, and with them the reader's selection.
export class Markdown {
  constructor(node, copyButton) {
    this.node = node;
    this.copyButton = copyButton;                   // makes the button of a code block
    this.shown = [];
  }

  render(text) {
    const sources = split(text.replace(/\r\n?/g, "\n").split("\n"));
    let place = 0;
    while (place < sources.length && place < this.shown.length && sources[place] === this.shown[place]) place++;
    while (this.node.childNodes.length > place) this.node.lastChild.remove();
    for (const source of sources.slice(place)) this.node.append(block(source.split("\n"), 0, this.copyButton));
    this.shown = sources;
  }
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

// The source of each top-level block.
function split(lines) {
  const sources = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) { at++; continue; }
    const end = blockEnd(lines, at);
    sources.push(lines.slice(at, end).join("\n"));
    at = end;
  }
  return sources;
}

function blockEnd(lines, at) {
  const fence = lines[at].match(FENCE);
  let end = at + 1;
  if (fence) {
    const closing = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
    while (end < lines.length && !closing.test(lines[end])) end++;
    return Math.min(end + 1, lines.length);
  }
  if (HEADING.test(lines[at]) || RULE.test(lines[at])) return end;
  const isQuote = line => /^ {0,3}>/.test(line);
  if (isQuote(lines[at])) {
    while (end < lines.length && isQuote(lines[end])) end++;
    return end;
  }
  const item = lines[at].match(ITEM);
  if (item) {
    const ordered = isOrdered(item);
    for (; end < lines.length; end++) {
      if (!lines[end].trim()) {                     // blank lines belong to the list where it goes on behind them
        let next = end;
        while (next < lines.length && !lines[next].trim()) next++;
        const follows = lines[next]?.match(ITEM);
        if (next === lines.length || !(/^ {2,}/.test(lines[next]) || (follows && isOrdered(follows) === ordered))) break;
        end = next;
      }
      const line = lines[end], other = line.match(ITEM);
      if (other && other[1].length <= item[1].length && isOrdered(other) !== ordered) break;
      if (!other && !/^\s/.test(line) && (HEADING.test(line) || FENCE.test(line) || RULE.test(line) || isQuote(line))) break;
    }
    return end;
  }
  if (isTable(lines, at)) {
    end = at + 2;
    while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end++;
    return end;
  }
  while (end < lines.length && lines[end].trim() && !FENCE.test(lines[end]) && !HEADING.test(lines[end])
         && !RULE.test(lines[end]) && !isQuote(lines[end]) && !ITEM.test(lines[end]) && !isTable(lines, end)) end++;
  return end;
}

const isOrdered = item => /\d/.test(item[2]);

function isTable(lines, at) {
  return at + 1 < lines.length && lines[at].includes("|") && lines[at + 1].includes("-") && DELIMITERS.test(lines[at + 1])
    && cells(lines[at]).length === cells(lines[at + 1]).length;
}

function block(lines, depth, copyButton) {
  const fence = lines[0].match(FENCE);
  if (fence) return code(lines, fence, copyButton);
  const heading = lines[0].match(HEADING);
  if (heading) return filled(`h${Math.min(6, heading[1].length + 2)}`, heading[2]);
  if (RULE.test(lines[0])) return make("hr");
  if (depth < DEEPEST && /^ {0,3}>/.test(lines[0])) {
    return within(make("blockquote", { dir: "auto" }), lines.map(line => line.replace(/^ {0,3}> ?/, "")), depth, copyButton);
  }
  if (depth < DEEPEST && ITEM.test(lines[0])) return list(lines, depth, copyButton);
  if (isTable(lines, 0)) return table(lines);
  return filled("p", lines.join("\n"));
}

function within(parent, lines, depth, copyButton) {
  for (const source of split(lines)) parent.append(block(source.split("\n"), depth + 1, copyButton));
  return parent;
}

function filled(tag, text) {
  const node = make(tag, { dir: "auto" });
  inline(node, text, 0);
  return node;
}

function code(lines, fence, copyButton) {
  const closed = lines.length > 1 && /^ {0,3}(`{3,}|~{3,})\s*$/.test(lines.at(-1));
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const language = fence[2].trim().split(/\s/)[0].slice(0, 30);
  const head = make("div", { className: "code-head" }, make("span", {}, plain(language)), copyButton(text));
  return make("div", { className: "code", dir: "ltr" }, head,
              make("pre", { tabIndex: 0 }, make("code", {}, plain(text))));
}

function list(lines, depth, copyButton) {
  const first = lines[0].match(ITEM), ordered = isOrdered(first), indent = first[1].length;
  const node = make(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(first[2], 10);
  let parts = null, inner = 0;
  const close = () => {
    if (!parts) return;
    const loose = parts.some((line, place) => !line.trim() && parts.slice(place).some(later => later.trim()));
    const item = within(make("li", { dir: "auto" }), parts, depth, copyButton);
    const only = item.firstElementChild;
    if (!loose && only?.tagName === "P") only.replaceWith(...only.childNodes);
    node.append(item);
  };
  for (const line of lines) {
    const item = line.match(ITEM);
    if (item && item[1].length < indent + 2) {
      close();
      inner = item[1].length + item[2].length + 1;
      parts = [item[3] ?? ""];
    } else parts.push(line.slice(Math.min(inner, line.length - line.trimStart().length)));
  }
  close();
  return node;
}

function cells(line) {
  const parts = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1").split(/(?<!\\)\|/);
  return parts.map(cell => cell.trim().replaceAll("\\|", "|"));
}

function table(lines) {
  const sides = cells(lines[1]).map(cell => cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "end") : "");
  const row = (line, tag) => {
    const node = make("tr"), values = cells(line);
    sides.forEach((side, place) => {
      const cell = filled(tag, values[place] ?? "");
      if (side) cell.className = side;
      node.append(cell);
    });
    return node;
  };
  const body = make("tbody", {}, ...lines.slice(2).map(line => row(line, "td")));
  return make("div", { className: "table", tabIndex: 0 }, make("table", {}, make("thead", {}, row(lines[0], "th")), body));
}

// ---- inside a block -------------------------------------------------------------------------------------------------

const INLINE = new RegExp([
  /\\([\\`*_{}[\]()#+\-.!|~<>])/,                   // 1 an escaped character
  /(`+)(?!`)([^]*?[^`])\2(?!`)/,                    // 2, 3 code
  /!?\[([^\][]{0,1000})\]\(<?([^\s()<>]{1,2000}(?:\([^\s()]{0,200}\)[^\s()<>]{0,500})?)>?(?: "[^"]{0,500}")?\)/,   // 4, 5 link
  /(\*\*|__)(?=\S)([^]{1,4000}?\S)\6/,              // 6, 7 strong
  /(~~)(?=\S)([^]{1,4000}?\S)\8/,                   // 8, 9 struck out
  /(\*)(?![\s*])([^*]{0,4000}?[^\s*])\10(?!\*)/,    // 10, 11 emphasis
  /(?<![\p{L}\p{N}_])(_)(?![\s_])([^_]{0,4000}?[^\s_])\12(?![\p{L}\p{N}_])/,     // 12, 13 emphasis
  /(https?:\/\/[^\s<>"'`\u3000-\u303f\uff00-\uffef]{1,2000}[^\s<>"'`.,:;!?)\]*_\u3000-\u303f\uff00-\uffef])/,     // 14 address
].map(part => part.source).join("|"), "u");

function inline(node, text, depth) {
  let rest = text;
  while (rest && depth < DEEPEST && rest.length <= LONGEST_INLINE) {
    const found = rest.match(INLINE);
    if (!found) break;
    node.append(...lines(rest.slice(0, found.index)));
    node.append(span(found, depth));
    rest = rest.slice(found.index + found[0].length);
  }
  node.append(...lines(rest));
}

function span(found, depth) {
  const [all, escaped, , codeText, label, target, strong, strongText, , struckText, , starText, , lineText, address] = found;
  if (escaped) return document.createTextNode(escaped);
  if (codeText !== undefined) return make("code", { dir: "ltr" }, plain(codeText.replace(/^ (.*\S.*) $/s, "$1")));
  if (target !== undefined) return link(target, label || target, all, depth);
  if (address) return link(address, address, all, DEEPEST);
  const [tag, inner] = strong ? ["strong", strongText] : struckText !== undefined ? ["s", struckText]
    : ["em", starText ?? lineText];
  const node = make(tag);
  inline(node, inner, depth + 1);
  return node;
}

// Only web and mail addresses become links. A picture is a link, too: loading it would tell its server about the reader.
function link(target, label, all, depth) {
  let url;
  try { url = new URL(target); } catch { return plain(all); }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return plain(all);
  const node = make("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow", title: url.href });
  inline(node, label, depth + 1);
  return make("bdi", {}, node);
}

function lines(text) {
  const nodes = [];
  text.split("\n").forEach((line, place) => {
    if (place) nodes.push(make("br"));
    if (line) nodes.push(plain(line.replace(/ +$/, place < text.split("\n").length - 1 ? "" : "$&")));
  });
  return nodes;
}

// Markdown as DOM nodes. Text only ever becomes text nodes, so nothing in it can become an element or a script.

const MAX_DEPTH = 8; // nested lists, quotes and emphasis; what is deeper stays plain text
const CALL = /\uE000(\d+)\uE001/; // stands for a calculator call while text is parsed

const FENCE = /^ {0,3}(`{3,}|~{3,}) *([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)(.*)$/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

const INLINE = new RegExp(
  [
    "\\\\([!-/:-@\\[-`{-~])", // 1: escaped
    "(`+)([^`]|[^`][\\s\\S]*?[^`])\\2(?!`)", // 2, 3: code
    "!?\\[([^\\[\\]\\n]*)\\]\\(\\s*<?([^()\\s<>]*(?:\\([^()\\s<>]*\\)[^()\\s<>]*)*)>?(?:\\s+\"[^\"\\n]*\")?\\s*\\)", // 4, 5: link
    "(https?:\\/\\/[^\\s<>\"'`]*[^\\s<>\"'`.,;:!?)\\]*_])", // 6: bare address
    "\\*\\*(?=\\S)([\\s\\S]*?\\S)\\*\\*", // 7: strong
    "(?<!\\w)__(?=\\S)([\\s\\S]*?\\S)__(?!\\w)", // 8: strong
    "\\*(?=[^\\s*])([\\s\\S]*?[^\\s*])\\*(?!\\*)", // 9: emphasis
    "(?<!\\w)_(?=[^\\s_])([\\s\\S]*?[^\\s_])_(?!\\w)", // 10: emphasis
    "~~(?=\\S)([\\s\\S]*?\\S)~~", // 11: deleted
  ].join("|"),
);

/** An element with a class and children, which are nodes or strings. */
export function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (value === undefined || value === false) continue;
    if (key in made && key !== "role") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** An icon of the page. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** The nodes of an answer: parts of type text are Markdown, calculator calls and results become chips. */
export function renderParts(parts) {
  const calls = [];
  let text = "";
  for (const part of parts) {
    if (part.type === "text") text += part.text.replace(/[\uE000\uE001]/g, "\uFFFD");
    else if (part.type === "python") {
      text += `\uE000${calls.length}\uE001`;
      calls.push({ call: part.text, result: null });
    } else if (calls.length) calls[calls.length - 1].result = part.text;
  }
  return new Renderer(calls).blocks(text.split("\n"), 0);
}

class Renderer {
  constructor(calls) {
    this.calls = calls;
  }

  blocks(lines, depth) {
    const out = document.createDocumentFragment();
    let at = 0;
    while (at < lines.length) {
      const line = lines[at];
      let match;
      if (!line.trim()) at += 1;
      else if ((match = FENCE.exec(line))) at = this.fence(out, lines, at, match);
      else if ((match = HEADING.exec(line))) {
        out.append(this.inline(element(`h${match[1].length}`), match[2], depth));
        at += 1;
      } else if (RULE.test(line)) {
        out.append(element("hr"));
        at += 1;
      } else if (depth < MAX_DEPTH && QUOTE.test(line)) {
        const start = at;
        while (at < lines.length && QUOTE.test(lines[at])) at += 1;
        const inner = lines.slice(start, at).map((each) => each.replace(QUOTE, ""));
        out.append(element("blockquote", {}, this.blocks(inner, depth + 1)));
      } else if (depth < MAX_DEPTH && ITEM.test(line)) at = this.list(out, lines, at, depth);
      else if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "") && lines[at + 1].includes("-"))
        at = this.table(out, lines, at, depth);
      else at = this.paragraph(out, lines, at, depth);
    }
    return out;
  }

  fence(out, lines, at, [, fence, language]) {
    const closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`);
    const start = at + 1;
    for (at = start; at < lines.length && !closing.test(lines[at]); at += 1);
    const code = element("code");
    this.text(code, lines.slice(start, at).join("\n"));
    const copy = element("button", { type: "button", className: "icon copy-code", "aria-label": "Copy code" }, icon("copy"));
    const bar = element("div", {}, element("span", {}, language || "code"), copy);
    out.append(element("div", { className: "codeblock" }, bar, element("pre", { tabIndex: 0 }, code)));
    return at + 1;
  }

  list(out, lines, at, depth) {
    const first = ITEM.exec(lines[at]);
    const ordered = /\d/.test(first[2]);
    const list = element(ordered ? "ol" : "ul");
    if (ordered) list.start = Number.parseInt(first[2], 10);
    while (at < lines.length) {
      const match = ITEM.exec(lines[at]);
      if (!match || match[1].length > first[1].length + 1 || /\d/.test(match[2]) !== ordered || RULE.test(lines[at])) break;
      const indent = match[1].length + match[2].length + 1;
      const inner = [match[3]];
      for (at += 1; at < lines.length; at += 1) {
        const line = lines[at];
        const deeper = line.length - line.trimStart().length >= Math.min(indent, match[1].length + 2);
        if (line.trim() ? !deeper : !(lines[at + 1] ?? "").startsWith(" ".repeat(match[1].length + 2))) break;
        inner.push(line.slice(Math.min(indent, line.length - line.trimStart().length)));
      }
      list.append(element("li", {}, this.blocks(inner, depth + 1)));
      while (at < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1] ?? "")) at += 1;
    }
    out.append(list);
    return at;
  }

  table(out, lines, at, depth) {
    const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
    const row = (kind, line) => element("tr", {}, ...cells(line).map((cell) => this.inline(element(kind), cell.trim(), depth)));
    const head = element("thead", {}, row("th", lines[at]));
    const body = element("tbody");
    for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) body.append(row("td", lines[at]));
    out.append(element("div", { className: "table" }, element("table", {}, head, body)));
    return at;
  }

  paragraph(out, lines, at, depth) {
    const start = at;
    const ends = (line) => !line.trim() || FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line) || ITEM.test(line);
    for (at += 1; at < lines.length && !ends(lines[at]); at += 1);
    out.append(this.inline(element("p"), lines.slice(start, at).map((line) => line.trim()).join("\n"), depth));
    return at;
  }

  inline(target, text, depth) {
    for (let match; depth <= MAX_DEPTH && (match = INLINE.exec(text)); ) {
      this.text(target, text.slice(0, match.index));
      text = text.slice(match.index + match[0].length);
      const [whole, escaped, , code, label, address, bare, strong1, strong2, em1, em2, deleted] = match;
      if (escaped) this.text(target, escaped);
      else if (code !== undefined) this.text(target.appendChild(element("code")), code.trim() || code);
      else if (address !== undefined || bare) this.link(target, label || address || bare, address ?? bare, whole, depth);
      else if (strong1 ?? strong2) target.append(this.inline(element("strong"), strong1 ?? strong2, depth + 1));
      else if (em1 ?? em2) target.append(this.inline(element("em"), em1 ?? em2, depth + 1));
      else target.append(this.inline(element("del"), deleted, depth + 1));
    }
    this.text(target, text);
    return target;
  }

  /** A link, if the address is of the web or of mail; otherwise the text as it is. */
  link(target, label, address, whole, depth) {
    let url = null;
    try {
      url = new URL(address);
    } catch {
      // not an address
    }
    if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return this.text(target, whole);
    const link = element("a", { href: url.href, target: "_blank", rel: "noopener noreferrer", title: url.href });
    if (label === address) this.text(link, label);
    else this.inline(link, label.replace(/https?:/g, (scheme) => scheme.replace(":", "\\:")), depth + 1);
    target.append(link);
  }

  /** Text with its line breaks and calculator calls. */
  text(target, text) {
    for (let match; (match = CALL.exec(text)); text = text.slice(match.index + match[0].length)) {
      this.lines(target, text.slice(0, match.index));
      target.append(chip(this.calls[Number(match[1])]));
    }
    this.lines(target, text);
  }

  lines(target, text) {
    if (target.nodeName === "CODE") {
      if (text) target.append(text);
      return;
    }
    text.split("\n").forEach((line, number) => {
      if (number) target.append(element("br"));
      if (line) target.append(line);
    });
  }
}

function chip({ call, result }) {
  const made = element("span", { className: "call", title: "Calculator" }, icon("calc"), element("code", {}, call));
  made.prepend(element("span", { className: "hidden" }, "calculator: "));
  if (result !== null) made.append(" = ", element("strong", {}, result));
  return made;
}

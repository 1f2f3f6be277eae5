// An answer's Markdown as elements. Text goes in as text nodes, a link leads where safe() lets it, and no image is fetched.

import { el, filled } from "./dom.js";
import { parse } from "./markdown.js";
import { showMath } from "./math.js";

const WORDS = /^(?:and|as|async|await|break|case|catch|class|const|continue|def|default|del|do|elif|else|enum|except|export|extends|False|false|finally|fn|for|from|func|function|if|impl|import|in|interface|is|lambda|let|match|mod|mut|new|None|nil|not|null|or|package|pass|pub|raise|return|self|static|struct|super|switch|this|throw|True|true|try|type|use|var|void|while|with|yield|select|insert|update|where|join|order|by|group)$/;
const SHARP = /^(py|python|sh|bash|shell|zsh|ruby|rb|r|yaml|yml|toml|ini|perl|make|makefile|dockerfile)$/i;
const MOST_COLOURED = 40000;

/** Code with its comments, strings, numbers and words of a language set apart, as far as one rule for all goes. */
function coloured(text, language) {
  if (!language || text.length > MOST_COLOURED) return [text];
  const comment = SHARP.test(language) ? "#[^\\n]*" : /^(sql|lua|haskell|hs)$/i.test(language) ? "--[^\\n]*" : "//[^\\n]*|/\\*(?:[^*]|\\*(?!/))*(?:\\*/)?";
  const pattern = new RegExp(`(${comment})|("(?:[^"\\\\\\n]|\\\\.)*"?|'(?:[^'\\\\\\n]|\\\\.)*'?)|\\b(\\d[\\w.]*)|([A-Za-z_]\\w*)`, "g");
  const parts = [];
  let at = 0;
  for (const { 0: all, 1: note, 2: string, 3: number, 4: word, index } of text.matchAll(pattern)) {
    const kind = note ? "note" : string ? "string" : number ? "number" : WORDS.test(word) && "word";
    if (!kind) continue;
    parts.push(text.slice(at, index), el("span", { class: `c-${kind}` }, all));
    at = index + all.length;
  }
  return [...parts, text.slice(at)];
}

/** Put a text on the clipboard and say so on the button; where that is not allowed, `place` is selected instead. */
export async function copy(text, button, place) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(place);
    button.textContent = "Selected; press Ctrl C";
  }
  setTimeout(() => (button.textContent = "Copy"), 2500);
}

function codeBox([, attributes, text = ""]) {
  const language = attributes["data-language"];
  const pre = el("pre", { tabindex: "0", dir: "ltr", ...attributes }, filled(el("code"), coloured(text, language)));
  const button = el("button", { class: "quiet", type: "button", "aria-label": "Copy the code", onclick: () => copy(text, button, pre) }, "Copy");
  return el("div", { class: "code" }, el("div", { class: "code-head" }, el("span", {}, language ?? ""), button), pre);
}

function elementOf(node) {
  if (typeof node === "string") return node;
  const [tag, attributes, ...children] = node;
  if (tag === "pre") return codeBox(node);
  if (tag === "math" || tag === "mathblock") return showMath(children[0] ?? "", tag === "mathblock");
  if (tag === "task") return el("input", { type: "checkbox", disabled: true, ...attributes, "aria-label": attributes.checked ? "done" : "to do" });
  const inside = children.map(elementOf);
  if (tag === "tight") return filled(document.createDocumentFragment(), inside);
  if (tag === "a") return filled(el("a", { ...attributes, target: "_blank", rel: "noopener noreferrer nofollow" }), inside);
  if (tag === "table") return el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" }, filled(el("table"), inside));
  const heading = /^h(\d)$/.exec(tag);
  const name = heading ? `h${Math.min(6, Number(heading[1]) + 2)}` : tag;
  const element = filled(el(name, attributes), inside);
  if (heading || /^(p|ul|ol|th|td)$/.test(tag)) element.dir = "auto"; // last: with each child it is found out anew
  return element;
}

/** Show a text; the blocks at its beginning that have not changed since the last time stay as they are. */
export function showMarkdown(container, text) {
  const nodes = parse(text);
  const blocks = nodes.map((node) => JSON.stringify(node));
  const before = container.childNodes.length === container.blocks?.length ? container.blocks : [];
  let same = 0;
  while (same < blocks.length && blocks[same] === before[same]) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  filled(container, nodes.slice(same).map(elementOf));
  container.blocks = blocks;
}

// Markdown as a tree of [tag, attributes, ...children], of plain data: prose.js makes elements of it. CommonMark with
// tables, tasks, strikethrough and mathematics; HTML is text. What is still being written is read as if it ended here.

import { inline, label } from "./inline.js";

const DEEPEST = 20; // quotes and lists in one another; deeper ones are text, so that the time stays linear
const MOST_MATH = 100; // lines
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-+*]|(\d{1,9})[.)])(?:( +)|$)/;
const FENCE = /^( {0,3})(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: |$)/;
const MATH = /^ {0,3}(\$\$|\\\[)/;
const LINK = /^ {0,3}\[([^[\]]{1,999})\]: *(?:<([^<>]*)>|(\S+))(?: +(?:"([^"]*)"|'([^']*)'|\(([^()]*)\)))? *$/;

const isBlank = (line) => line.trim() === "";
/** Whether a line may be of a paragraph that the next one goes on with. */
const holdsText = (line) => !/^[ >]*([*+-] [ >]*)*[*+-]?(#{1,6}( .*)?)?$/.test(line);
const indentOf = (line) => line.length - line.trimStart().length;

/** Tabs at the beginning as spaces, to the next fourth column. */
function untabbed(line) {
  if (!line.includes("\t")) return line;
  let text = "";
  let at = 0;
  for (; at < line.length && /[\t \-+*>]|\d|[.)]/.test(line[at]); at++) text += line[at] === "\t" ? " ".repeat(4 - (text.length % 4)) : line[at];
  return text + line.slice(at);
}

function isRule(line) {
  const signs = indentOf(line) < 4 ? line.replace(/ /g, "") : "";
  return signs.length > 2 && /^(\*+|-+|_+)$/.test(signs);
}

function withoutEnd(text, sign) {
  let end = text.length;
  while (text[end - 1] === sign) end--;
  return text.slice(0, end);
}

/** The cells of a table's row. */
function cellsOf(line) {
  const cells = [""];
  for (let at = 0, row = line.trim(); at < row.length; at++) {
    if (row[at] === "\\" && row[at + 1] === "|") cells[cells.length - 1] += row[++at];
    else if (row[at] === "\\") cells[cells.length - 1] += row[at] + (row[++at] ?? "");
    else if (row[at] !== "|") cells[cells.length - 1] += row[at];
    else if (at && at < row.length - 1) cells.push("");
  }
  return cells.map((cell) => cell.trim());
}

/** How the columns are set, if these two lines begin a table. */
function columnsOf(line, next) {
  if (!line.includes("|") || next === undefined || !/^[ |:-]+$/.test(next) || !next.includes("-") || !/[|:]/.test(next)) return null;
  const marks = cellsOf(next);
  if (!marks.every((mark) => /^:?-+:?$/.test(mark)) || cellsOf(line).length !== marks.length) return null;
  return marks.map((mark) => (mark.endsWith(":") ? (mark[0] === ":" ? "center" : "right") : mark[0] === ":" ? "left" : null));
}

/** Whether a line ends the paragraph before it. */
function interrupts(line) {
  const item = ITEM.exec(line);
  if (item && item[4] !== undefined && !isBlank(line.slice(item[0].length)) && (item[3] === undefined || Number(item[3]) === 1)) return true;
  return QUOTE.test(line) || FENCE.test(line) || HEADING.test(line) || isRule(line) || MATH.test(line);
}

class Blocks {
  constructor() {
    this.links = new Map();
    this.waiting = []; // [node, text]: read when all links are known
  }

  textual(tag, attributes, text) {
    const node = [tag, attributes];
    this.waiting.push([node, text]);
    return node;
  }

  read(lines, depth = 0) {
    const nodes = Object.assign([], { isSpaced: false });
    let at = 0;
    while (at < lines.length) {
      if (isBlank(lines[at])) {
        at++;
        continue;
      }
      if (nodes.length && isBlank(lines[at - 1])) nodes.isSpaced = true;
      const [node, next] = this.block(lines, at, depth);
      if (node) nodes.push(node);
      at = next;
    }
    return nodes;
  }

  /** The block that begins at a line, and the line behind it. */
  block(lines, at, depth) {
    const line = lines[at];
    if (indentOf(line) > 3) return this.indented(lines, at);
    const fence = FENCE.exec(line);
    if (fence) return this.fence(lines, at, fence);
    const math = MATH.exec(line);
    if (math) {
      const found = this.math(lines, at, math);
      if (found) return found;
    }
    const heading = HEADING.exec(line);
    if (heading) {
      const text = line.slice(heading[0].length).trim();
      const bare = withoutEnd(text, "#");
      return [this.textual(`h${heading[1].length}`, {}, bare === "" || bare.endsWith(" ") ? bare.trim() : text), at + 1];
    }
    if (isRule(line)) return [["hr", {}], at + 1];
    if (depth < DEEPEST && QUOTE.test(line)) return this.quote(lines, at, depth);
    if (depth < DEEPEST && ITEM.test(line)) return this.list(lines, at, depth);
    return this.paragraph(lines, at);
  }

  indented(lines, at) {
    let end = at;
    for (let next = at; next < lines.length && (isBlank(lines[next]) || indentOf(lines[next]) > 3); next++) if (!isBlank(lines[next])) end = next;
    return [["pre", {}, lines.slice(at, end + 1).map((line) => line.slice(4)).join("\n")], end + 1];
  }

  fence(lines, at, [, { length: indent }, mark, info]) {
    const close = (line) => indentOf(line) < 4 && line.trim().length >= mark.length && withoutEnd(line.trim(), mark[0]) === "";
    let end = at + 1;
    while (end < lines.length && !close(lines[end])) end++;
    const inside = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
    const [language] = info.trim().split(/\s/, 1);
    return [["pre", language ? { "data-language": language.slice(0, 40) } : {}, inside.join("\n")], end + 1];
  }

  /** $$ … $$ or \[ … \] over whole lines; one that is not closed goes on to the end, if nothing stands before its blank line. */
  math(lines, at, [opening, mark]) {
    const close = mark === "$$" ? "$$" : "\\]";
    const inside = [];
    for (let end = at, line = lines[at].slice(opening.length); end < lines.length; line = lines[++end]) {
      const stop = line.indexOf(close);
      if (stop >= 0 && !isBlank(line.slice(stop + 2))) return null;
      inside.push(stop >= 0 ? line.slice(0, stop) : line);
      if (stop >= 0 || end === lines.length - 1) return [["mathblock", {}, inside.join("\n").trim()], end + 1];
      if ((isBlank(line) && end > at) || end - at > MOST_MATH) return null;
    }
    return null;
  }

  quote(lines, at, depth) {
    const inside = [];
    let isCode = false;
    let end = at;
    for (; end < lines.length; end++) {
      const isQuoted = QUOTE.test(lines[end]);
      const isLazy = !isQuoted && !isCode && !isBlank(lines[end]) && holdsText(inside.at(-1)) && !interrupts(lines[end]);
      if (!isQuoted && !isLazy) break;
      inside.push(isQuoted ? lines[end].replace(QUOTE, "") : lines[end].trimStart());
      if (isQuoted && FENCE.test(inside.at(-1))) isCode = !isCode;
    }
    return [["blockquote", {}, ...this.read(inside, depth + 1)], end];
  }

  list(lines, at, depth) {
    const first = ITEM.exec(lines[at]);
    const kind = first[2].at(-1);
    const items = [];
    let isLoose = false;
    let end = at;
    for (;;) {
      const match = end < lines.length && !isRule(lines[end]) ? ITEM.exec(lines[end]) : null;
      if (!match || match[2].at(-1) !== kind) break;
      const [inside, next, isSpaced] = this.item(lines, end, match);
      const [node, holdsSpace] = this.itemNode(inside, depth);
      const after = lines[next] !== undefined && !isRule(lines[next]) ? ITEM.exec(lines[next]) : null;
      const isMore = after && after[2].at(-1) === kind;
      items.push(node);
      isLoose ||= holdsSpace || (isSpaced && isMore);
      end = next;
    }
    if (!isLoose) for (const item of items) for (const node of item) if (node[0] === "p") node[0] = "tight";
    const start = Number(first[3] ?? 1);
    return [[first[3] === undefined ? "ul" : "ol", start === 1 ? {} : { start }, ...items], end];
  }

  /** The lines of an item without its indent, the line behind it, and whether blank ones stand between. */
  item(lines, at, [marker, before, sign, , spaces = ""]) {
    const isEmpty = isBlank(lines[at].slice(marker.length));
    const indent = before.length + sign.length + (isEmpty || spaces.length > 4 ? 1 : spaces.length);
    const inside = [lines[at].slice(indent)];
    let blanks = 0;
    let isCode = FENCE.test(inside[0]);
    let end = at + 1;
    for (; end < lines.length; end++) {
      const line = lines[end];
      if (isBlank(line)) {
        blanks++;
        continue;
      }
      const isInside = indentOf(line) >= indent && !(isEmpty && blanks && inside.length === 1);
      const isLazy = !isInside && !blanks && !isCode && holdsText(inside.at(-1)) && !interrupts(line) && !ITEM.test(line);
      if (!isInside && !isLazy) break;
      for (; blanks; blanks--) inside.push("");
      inside.push(isInside ? line.slice(indent) : line.trimStart());
      if (FENCE.test(inside.at(-1))) isCode = !isCode;
    }
    return [inside, end, blanks > 0];
  }

  itemNode(lines, depth) {
    const task = /^\s*\[([ xX])\] (?=\s*\S)/.exec(lines[0]);
    const inside = task ? [lines[0].slice(task[0].length), ...lines.slice(1)] : lines;
    const nodes = this.read(inside, depth + 1);
    return [["li", task ? { class: "task" } : {}, ...(task ? [["task", { checked: task[1] !== " " }]] : []), ...nodes], nodes.isSpaced];
  }

  table(lines, at, columns) {
    const cell = (tag) => (text, column) => this.textual(tag, columns[column] ? { class: columns[column] } : {}, text);
    const head = ["tr", {}, ...cellsOf(lines[at]).map(cell("th"))];
    const rows = [];
    let end = at + 2;
    for (; end < lines.length && !isBlank(lines[end]) && !interrupts(lines[end]); end++) rows.push(["tr", {}, ...cellsOf(lines[end]).slice(0, columns.length).map(cell("td"))]);
    return [["table", {}, ["thead", {}, head], ...(rows.length ? [["tbody", {}, ...rows]] : [])], end];
  }

  paragraph(lines, at) {
    const link = LINK.exec(lines[at]);
    if (link) {
      const name = label(link[1]);
      if (!this.links.has(name)) this.links.set(name, { address: link[2] ?? link[3], title: link[4] ?? link[5] ?? link[6] ?? "" });
      return [null, at + 1];
    }
    const inside = [];
    let end = at;
    for (; end < lines.length && !isBlank(lines[end]); end++) {
      const line = lines[end];
      if (end > at && indentOf(line) < 4) {
        const [under] = line.trim();
        const isUnder = (under === "=" || under === "-") && withoutEnd(line.trim(), under) === "";
        if (isUnder && (line.trim().length > 1 || lines.length > end + 1)) return [this.textual(under === "=" ? "h1" : "h2", {}, inside.join("\n")), end + 1];
        if (interrupts(line)) break;
      }
      const columns = columnsOf(line, lines[end + 1]);
      if (columns && end === at) return this.table(lines, at, columns);
      if (columns) break;
      inside.push(line.trimStart());
    }
    return [this.textual("p", {}, inside.join("\n").trimEnd()), end];
  }
}

/** The blocks of a text. */
export function parse(text) {
  const blocks = new Blocks();
  const nodes = blocks.read(text.replaceAll("\0", "\ufffd").split(/\r\n|\n|\r/).map(untabbed));
  for (const [node, inside] of blocks.waiting) for (const child of inline(inside, blocks.links)) node.push(child);
  return nodes;
}

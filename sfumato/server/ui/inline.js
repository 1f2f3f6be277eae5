// Markdown within a paragraph, as a tree of [tag, attributes, ...children]. Every loop is linear in the text: what a
// closer could be is looked up in lists made beforehand, and what a link may hold has a bound.

const SPECIAL = /[\\`*_~[\]!<$&\n]|https?:\/\//g;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const SPACE = /\s/;
const MOST_LABEL = 999;
const MOST_LINK = 2000;
const MOST_DEPTH = 30;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", hellip: "…", ndash: "–", mdash: "—", rarr: "→", times: "×", deg: "°" };

const unescaped = (text) => text.replace(/\\([!-/:-@[-`{-~])/g, "$1").replace(/&(#?\w{1,12});/g, (whole, name) => entity(name) ?? whole);

function entity(name) {
  if (name[0] !== "#") return Object.hasOwn(ENTITIES, name) ? ENTITIES[name] : null;
  const code = /^#x[\da-f]+$/i.test(name) ? parseInt(name.slice(2), 16) : /^#\d+$/.test(name) ? Number(name.slice(1)) : -1;
  if (code < 0) return null;
  return code && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) ? String.fromCodePoint(code) : "\ufffd";
}

/** An address that a click may open, else null: no script, no data, no file. */
export function safe(address) {
  const plain = unescaped(address).replace(/[\0-\x1f\x7f]/g, "").trim().replaceAll(" ", "%20");
  return /^(https?:\/\/|mailto:)/i.test(plain) ? plain : null;
}

export const label = (text) => text.trim().replace(/\s+/g, " ").toLowerCase();

/** Where a mark stands, in order, asked for with places that only grow. */
class Places {
  constructor(places) {
    this.places = places;
    this.at = 0;
  }

  after(place) {
    while (this.at < this.places.length && this.places[this.at] < place) this.at++;
    return this.places[this.at] ?? -1;
  }
}

const placesOf = (text, pattern) => new Places([...text.matchAll(pattern)].map((match) => match.index));

function lookups(text) {
  const ticks = new Map();
  for (const { index, 0: run } of text.matchAll(/`+/g)) {
    if (!ticks.has(run.length)) ticks.set(run.length, []);
    ticks.get(run.length).push(index);
  }
  for (const [length, places] of ticks) ticks.set(length, new Places(places));
  return { ticks, tick: placesOf(text, /`/g), dollar: placesOf(text, /(?<![\s\\$])\$(?![\d$])/g), dollars: placesOf(text, /\$\$/g), paren: placesOf(text, /\\\)/g), bracket: placesOf(text, /\\\]/g) };
}

/** The children that a paragraph's text becomes. `links`: the addresses of its document's references. */
export function inline(text, links = new Map()) {
  return new Reader(text, links).read();
}

class Reader {
  constructor(text, links) {
    Object.assign(this, { text, links, tokens: [], runs: [], brackets: [], at: 0, marks: lookups(text) });
  }

  read() {
    const { text } = this;
    while (this.at < text.length) {
      SPECIAL.lastIndex = this.at;
      const next = SPECIAL.exec(text)?.index ?? text.length;
      if (next > this.at) this.put(text.slice(this.at, next));
      this.at = next;
      if (next < text.length && !this.special(text[next])) this.put(text[this.at++]);
    }
    pair(this.runs);
    return build(this.tokens);
  }

  put(...nodes) {
    this.tokens.push(...nodes.map((node) => ({ node })));
  }

  skip(length, ...nodes) {
    this.put(...nodes);
    this.at += length;
    return true;
  }

  /** Whether something begins here; if so it is read. */
  special(sign) {
    const { text, at } = this;
    if (sign === "\\") return this.escape(text[at + 1]);
    if (sign === "`") return this.code();
    if (sign === "$") return this.dollars();
    if ("*_~".includes(sign)) return this.run(sign);
    if (sign === "\n") return this.newline();
    if (sign === "!" && text[at + 1] === "[") return this.openBracket(2);
    if (sign === "[") return this.openBracket(1);
    if (sign === "]") return this.closeBracket();
    if (sign === "<") return this.angle();
    if (sign === "&") return this.reference();
    return sign === "h" && this.address();
  }

  escape(next) {
    if (next === "\n") return this.skip(2, ["br", {}]);
    if (next === "(" || next === "[") {
      const end = this.marks[next === "(" ? "paren" : "bracket"].after(this.at + 2);
      if (end > 0) return this.math(2, end, 2, next === "[");
    }
    return next !== undefined && /[!-/:-@[-`{-~]/.test(next) && this.skip(2, next);
  }

  math(before, end, after, isBlock) {
    return this.skip(end + after - this.at, [isBlock ? "mathblock" : "math", {}, this.text.slice(this.at + before, end).trim()]);
  }

  dollars() {
    const { text, at } = this;
    if (text[at + 1] === "$") {
      const end = this.marks.dollars.after(at + 3);
      return end > 0 ? this.math(2, end, 2, true) : this.skip(2, "$$");
    }
    const end = SPACE.test(text[at + 1] ?? " ") ? -1 : this.marks.dollar.after(at + 2);
    const tick = this.marks.tick.after(at + 1);
    return end > 0 && (tick < 0 || tick > end) && this.math(1, end, 1, false);
  }

  code() {
    const { text, at } = this;
    let length = 1;
    while (text[at + length] === "`") length++;
    const end = this.marks.ticks.get(length).after(at + length);
    if (end < 0) return this.skip(length, "`".repeat(length));
    let inside = text.slice(at + length, end).replaceAll("\n", " ");
    if (/^ .* $/.test(inside) && inside.trim()) inside = inside.slice(1, -1);
    return this.skip(end + length - at, ["code", {}, inside]);
  }

  newline() {
    const last = this.tokens.at(-1);
    const isHard = typeof last?.node === "string" && last.node.endsWith("  ");
    if (typeof last?.node === "string") last.node = last.node.trimEnd();
    let { at } = this;
    while (" \t\n".includes(this.text[at] ?? "x")) at++;
    return this.skip(at - this.at, isHard ? ["br", {}] : "\n");
  }

  reference() {
    const match = /^&(#?\w{1,12});/.exec(this.text.slice(this.at, this.at + 15));
    const sign = match && entity(match[1]);
    return sign !== null && this.skip(match[0].length, sign);
  }

  angle() {
    const inside = /^<([^\s<>]{1,1999})>/.exec(this.text.slice(this.at, this.at + MOST_LINK + 1))?.[1];
    if (!inside) return false;
    const isMail = /^[\w.!#$%&'*+/=?^`{|}~-]+@[\w-]+(\.[\w-]+)*$/.test(inside);
    const href = safe(isMail ? `mailto:${inside}` : inside);
    return href !== null && this.skip(inside.length + 2, ["a", { href }, inside]);
  }

  address() {
    const { text, at } = this;
    if (/[\p{L}\p{N}]/u.test(text[at - 1] ?? "")) return false;
    let [address] = /^https?:\/\/[^\s<>`[\]]*/.exec(text.slice(at, at + MOST_LINK));
    let open = 0;
    const end = [...address].findIndex((sign) => (open += sign === "(" ? 1 : sign === ")" ? -1 : 0) < 0);
    if (end >= 0) address = address.slice(0, end);
    while (/[?!.,:;*_~'"$]$/.test(address)) address = address.slice(0, -1);
    return /:\/\/./.test(address) && this.skip(address.length, ["a", { href: address }, address]);
  }

  run(sign) {
    const { text, at } = this;
    let length = 1;
    while (text[at + length] === sign) length++;
    const before = at && text.codePointAt(text.codePointAt(at - 2) > 0xffff ? at - 2 : at - 1);
    const left = at ? String.fromCodePoint(before) : " ";
    const right = at + length < text.length ? String.fromCodePoint(text.codePointAt(at + length)) : " ";
    const [leftIs, rightIs] = [left, right].map((one) => (SPACE.test(one) ? 1 : PUNCTUATION.test(one) ? 2 : 0));
    const canOpen = rightIs === 0 || (rightIs === 2 && leftIs > 0);
    const canClose = leftIs === 0 || (leftIs === 2 && rightIs > 0);
    const run = { sign, length, left: length, closes: [], opens: [] };
    run.canOpen = canOpen && (sign !== "_" || !canClose || leftIs === 2);
    run.canClose = canClose && (sign !== "_" || !canOpen || rightIs === 2);
    this.tokens.push({ run });
    if (sign !== "~" || length === 2) this.runs.push(run);
    this.at += length;
    return true;
  }

  openBracket(length) {
    if (this.brackets.length) this.brackets.at(-1).holdsBracket = true;
    const token = { node: this.text.slice(this.at, this.at + length) };
    this.brackets.push({ token, isImage: length === 2, start: this.at + length, runs: this.runs.length });
    this.tokens.push(token);
    this.at += length;
    return true;
  }

  closeBracket() {
    const bracket = this.brackets.pop();
    if (!bracket) return false;
    const inside = this.text.slice(bracket.start, this.at);
    const link = this.target() ?? this.named(inside, bracket.holdsBracket);
    if (!link) return false;
    pair(this.runs.splice(bracket.runs));
    const href = safe(link.address);
    bracket.token.node = null;
    bracket.token.open = href === null ? ["span", {}] : ["a", { href, ...(link.title ? { title: link.title } : {}), ...(bracket.isImage ? { class: "picture" } : {}) }];
    this.tokens.push({ isClose: true });
    if (!bracket.isImage) this.brackets = [];
    this.at = link.end;
    return true;
  }

  /** (address "title") behind a bracket. */
  target() {
    const near = this.text.slice(this.at + 1, this.at + 1 + MOST_LINK);
    const start = /^\([ \t\n]*/.exec(near)?.[0].length;
    if (!start) return null;
    let end = start;
    let address;
    if (near[start] === "<") {
      const inside = /^<([^<>\n]*)>/.exec(near.slice(start));
      if (!inside) return null;
      [, address] = inside;
      end += inside[0].length;
    } else {
      for (let depth = 0; end < near.length && !/[\s\0-\x1f]/.test(near[end]); end++) {
        if (near[end] === "\\") end++;
        else if (near[end] === "(") depth++;
        else if (near[end] === ")" && --depth < 0) break;
      }
      address = near.slice(start, end);
    }
    const rest = /^(?:[ \t\n]+(?:"((?:[^"\\]|\\[^])*)"|'((?:[^'\\]|\\[^])*)'|\(((?:[^()\\]|\\[^])*)\)))?[ \t\n]*\)/.exec(near.slice(end));
    if (!rest) return null;
    return { address, title: unescaped(rest[1] ?? rest[2] ?? rest[3] ?? ""), end: this.at + 1 + end + rest[0].length };
  }

  /** [text][name], [name][] and [name], for the names that have an address. */
  named(inside, holdsBracket) {
    if (!this.links.size) return null;
    const second = /^\[([^[\]]{0,999})\]/.exec(this.text.slice(this.at + 1, this.at + 3 + MOST_LABEL));
    const name = second?.[1].trim() ? second[1] : inside;
    if (name.length > MOST_LABEL || (name === inside && holdsBracket)) return null;
    const link = this.links.get(label(name));
    return link && { ...link, end: this.at + 1 + (second?.[0].length ?? 0) };
  }
}

/** CommonMark's rule for emphasis: each closing run is met by the nearest opening one. */
function pair(runs) {
  const bottoms = new Map(); // kind of closer -> below which run there is no opener for it
  runs.forEach((run, at) => Object.assign(run, { previous: runs[at - 1] ?? null, next: runs[at + 1] ?? null, order: at }));
  let closer = runs[0] ?? null;
  while (closer) {
    if (!closer.canClose || !closer.left) {
      closer = closer.next;
      continue;
    }
    const kind = `${closer.sign}${closer.canOpen}${closer.length % 3}`;
    const bottom = bottoms.get(kind) ?? -1;
    let opener = closer.previous;
    while (opener && opener.order > bottom && !meets(opener, closer)) opener = opener.previous;
    if (!opener || opener.order <= bottom) {
      bottoms.set(kind, closer.order - 1);
      if (!closer.canOpen) drop(closer);
      closer = closer.next;
      continue;
    }
    const used = opener.left > 1 && closer.left > 1 ? 2 : 1;
    const tag = closer.sign === "~" ? "del" : used === 2 ? "strong" : "em";
    opener.opens.unshift(tag);
    closer.closes.push(tag);
    for (let inner = closer.previous; inner !== opener; inner = inner.previous) drop(inner);
    for (const run of [opener, closer]) if ((run.left -= used) === 0) drop(run);
    if (!closer.left) closer = closer.next;
  }
}

function meets(opener, closer) {
  if (opener.sign !== closer.sign || !opener.canOpen || !opener.left) return false;
  const isOdd = (closer.canOpen || opener.canClose) && (opener.length + closer.length) % 3 === 0;
  return !isOdd || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

function drop(run) {
  if (run.previous) run.previous.next = run.next;
  if (run.next) run.next.previous = run.previous;
}

/** The tree of the tokens; what is nested too deeply for a page loses its tag, not its text. */
function build(tokens) {
  const top = [];
  const stack = [top];
  const add = (node) => {
    const into = stack.at(-1);
    if (typeof node === "string" && typeof into.at(-1) === "string") into[into.length - 1] += node;
    else if (node !== "") into.push(node);
  };
  const isInLink = () => stack.slice(1, MOST_DEPTH + 2).some(([tag]) => tag === "a");
  const open = (tag, attributes) => {
    const isTooDeep = stack.length > MOST_DEPTH;
    const node = isTooDeep ? stack.at(-1) : tag === "a" && isInLink() ? ["span", {}] : [tag, attributes];
    if (!isTooDeep) stack.at(-1).push(node);
    stack.push(node);
  };
  for (const { node, run, open: link, isClose } of tokens) {
    if (link) open(...link);
    else if (isClose) stack.pop();
    else if (run) {
      for (const _ of run.closes) stack.pop();
      add(run.sign.repeat(run.left));
      for (const tag of run.opens) open(tag, {});
    } else if (typeof node === "string") add(node);
    else if (node[0] === "a" && isInLink()) add(node[2]);
    else stack.at(-1).push(node);
  }
  return top;
}

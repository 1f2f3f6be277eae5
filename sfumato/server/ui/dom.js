// Elements from data. Text goes in as text nodes only: nothing a model writes is ever read as HTML.

export const byId = (id) => document.getElementById(id);

/** An element with attributes, `on…` listeners and children; null, undefined and false are left out. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Say something to a screen reader, once. Sparingly: starts, ends and troubles, never tokens. */
export function announce(text) {
  byId("announce").textContent = text;
}

/** Text with its code fences set apart; all else stays as it was written. */
export function showText(container, text) {
  const parts = [];
  let rest = text;
  while (rest) {
    const open = /(^|\n)```([^\n`]*)\n/.exec(rest);
    if (!open) break;
    const before = rest.slice(0, open.index);
    const inside = rest.slice(open.index + open[0].length);
    const close = /(^|\n)```[ \t]*(\n|$)/.exec(inside);
    if (before) parts.push(el("p", { class: "plain" }, before));
    parts.push(el("pre", { tabindex: "0", "data-language": open[2].trim() || null }, el("code", {}, close ? inside.slice(0, close.index) : inside)));
    rest = close ? inside.slice(close.index + close[0].length) : "";
  }
  if (rest) parts.push(el("p", { class: "plain" }, rest));
  container.replaceChildren(...parts);
}

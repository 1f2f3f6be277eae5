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

/** An element with as many children as there are: a call takes some ten thousand arguments at most. */
export function filled(node, children) {
  for (const child of children) node.append(child);
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

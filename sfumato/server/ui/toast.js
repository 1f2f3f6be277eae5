// A line at the foot of the page with one thing to do: undo, mostly. It goes by itself, but not under a pointer or the focus.

import { announce, byId, el } from "./dom.js";

const LASTS = 15_000; // ms
let close = () => {};

/** Say `words` with a button; `gone` is called when it goes without the button having been used. */
export function toast(words, name, act, gone = () => {}) {
  close();
  const button = el("button", { type: "button" }, name);
  const dismiss = el("button", { class: "quiet small", type: "button", "aria-label": "Dismiss" }, "×");
  const box = el("div", { class: "toast" }, el("span", {}, words), button, dismiss);
  let timer;
  let isOver = false;
  const end = (then) => {
    if (isOver) return;
    isOver = true;
    clearTimeout(timer);
    box.remove();
    then();
  };
  const wait = () => (timer = setTimeout(() => (box.matches(":hover, :focus-within") ? wait() : end(gone)), LASTS));
  close = () => end(gone);
  button.addEventListener("click", () => end(act));
  dismiss.addEventListener("click", close);
  byId("toasts").replaceChildren(box);
  announce(`${words} ${name} is at the end of the page.`);
  wait();
  return button;
}

// What the user said: shown, edited into another version of it, and the arrows between versions.

import { el } from "./dom.js";

/** Arrows and “2/3”, where a message has several versions. `go(version)` shows another. */
export function branches(all, message, go) {
  if (all.length < 2) return null;
  const at = all.indexOf(message);
  const arrow = (step, sign, name) => el("button", { class: "quiet small", type: "button", "aria-label": name, disabled: !all[at + step], onclick: () => go(all[at + step], step) }, sign);
  return el("span", { class: "branches", role: "group", "aria-label": "Versions" },
    arrow(-1, "‹", "Previous version"), el("span", {}, `${at + 1}/${all.length}`), arrow(1, "›", "Next version"));
}

/** A message of the user; `edit(text)` sends another version. */
export function saidTurn(message, edit) {
  const text = el("p", { class: "plain", dir: "auto" }, message.content);
  const button = el("button", { class: "quiet edit", type: "button" }, "Edit");
  const actions = el("div", { class: "row actions" }, button);
  const bubble = el("div", { class: "bubble" }, text);
  const root = el("article", { class: "turn said", "aria-label": "You" }, bubble, actions);
  button.addEventListener("click", () => {
    const field = el("textarea", { "aria-label": "Edit the message", value: message.content, dir: "auto", rows: Math.min(12, message.content.split("\n").length + 1) });
    const close = () => {
      bubble.replaceChildren(text);
      root.classList.remove("editing");
      button.focus();
    };
    const send = (event) => {
      event?.preventDefault();
      if (field.value.trim() && field.value !== message.content) edit(field.value);
      else close();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
    });
    bubble.replaceChildren(el("form", { onsubmit: send }, field, el("div", { class: "row" },
      el("button", { class: "primary", type: "submit" }, "Send"), el("button", { type: "button", onclick: close }, "Cancel"))));
    root.classList.add("editing");
    field.focus();
  });
  return root;
}

/** What a called function gave. */
export function resultTurn(message) {
  return el("article", { class: "turn result", "aria-label": `Result of ${message.name}` },
    el("p", {}, "Result of ", el("code", {}, message.name)), el("pre", { tabindex: "0" }, message.content), el("div", { class: "row actions" }));
}

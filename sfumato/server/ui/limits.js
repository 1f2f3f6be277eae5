// What the settings ask of every answer, said where answers are asked for, each with a button that ends it.

import { byId, el } from "./dom.js";
import * as settings from "./settings.js";
import { LIMITING, nameOf } from "./words.js";

const short = (value) => {
  const text = Array.isArray(value) ? value.join(", ") : typeof value === "object" ? "" : String(value);
  return text === "true" || text === "" ? "" : `: ${text.length > 24 ? `${text.slice(0, 23)}…` : text}`;
};

export function showLimits() {
  const changes = settings.changes();
  const limiting = changes.filter(([name]) => LIMITING.includes(name));
  const others = changes.length - limiting.length;
  const chip = ([name, value]) => {
    const words = `${nameOf(name)}${short(value)}`;
    const clear = () => {
      settings.clear(name);
      showLimits();
      (byId("limits").querySelector("button") ?? byId("message")).focus();
    };
    return el("button", { class: "chip", type: "button", title: `Set ${name} to its default`, "aria-label": `${words}. Click to clear.`, onclick: clear }, words, el("span", { "aria-hidden": "true" }, " ×"));
  };
  const link = others ? el("a", { href: "#/settings" }, `${others} ${others === 1 ? "setting" : "settings"} changed`) : null;
  byId("limits").replaceChildren(...limiting.map(chip), ...(link ? [link] : []));
  byId("limits").hidden = !changes.length;
}

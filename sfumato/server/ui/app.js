// The page: its sections by the address's hash, the model's state, the theme. Each section has a module of its own.

import { get } from "./api.js";
import * as chat from "./chat.js";
import * as decide from "./decide.js";
import { byId } from "./dom.js";
import * as editor from "./editor.js";
import * as settings from "./settings.js";
import { load, save } from "./store.js";
import * as sudoku from "./sudoku.js";

const SECTIONS = ["chat", "editor", "decide", "sudoku", "settings"];
const THEMES = ["auto", "light", "dark"];

function enter() {
  const section = SECTIONS.find((name) => `#/${name}` === location.hash) ?? "chat";
  for (const name of SECTIONS) byId(name).hidden = name !== section;
  for (const link of document.querySelectorAll(".sections a")) {
    if (link.hash === `#/${section}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = section === "chat" ? "Sfumato" : `${section[0].toUpperCase()}${section.slice(1)} · Sfumato`;
  if (section === "settings") settings.enter();
  if (section === "chat") chat.enter();
  if (section === "decide") decide.enter();
}

const theme = () => THEMES.find((name) => name === load("theme", "")) ?? "auto";

function showTheme() {
  if (theme() === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme();
  byId("theme").textContent = `Theme: ${theme()}`;
}

let again;

/** What the header says of the model: the model's name, or why there is none; asks again while there is none. */
async function look() {
  clearTimeout(again);
  const model = byId("model");
  try {
    const { data } = await get("v1/models");
    settings.setModels(data);
    model.dataset.state = "ready";
    byId("model-name").textContent = data[0]?.id ?? "no model";
  } catch (error) {
    const words = { offline: "no server", key: "key needed", busy: "loading", worker: "starting" };
    model.dataset.state = error.kind === "offline" || error.kind === "key" ? "off" : "waiting";
    byId("model-name").textContent = words[error.kind] ?? "not ready";
    clearTimeout(again);
    if (error.kind !== "key") again = setTimeout(look, 4000);
  }
}

showTheme();
byId("theme").addEventListener("click", () => {
  save("theme", THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]);
  showTheme();
});
document.addEventListener("sfumato:look", look); // after every answer and trouble: what it said may be old
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
settings.start({ onKey: look });
chat.start();
editor.start();
decide.start();
sudoku.start();
addEventListener("hashchange", enter);
enter();
look();

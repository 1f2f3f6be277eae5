// The page: rooms by the address's hash, the model's lamp, the theme. Each room has a module of its own.

import { get } from "./api.js";
import * as chat from "./chat.js";
import { byId } from "./dom.js";
import * as editor from "./editor.js";
import * as settings from "./settings.js";
import { load, save } from "./store.js";
import * as sudoku from "./sudoku.js";

const ROOMS = ["chat", "editor", "sudoku", "settings"];
const THEMES = ["auto", "light", "dark"];

function enter() {
  const room = ROOMS.find((name) => `#/${name}` === location.hash) ?? "chat";
  for (const name of ROOMS) byId(name).hidden = name !== room;
  for (const link of document.querySelectorAll(".rooms a")) {
    if (link.hash === `#/${room}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = room === "chat" ? "Sfumato" : `${room[0].toUpperCase()}${room.slice(1)} · Sfumato`;
  if (room === "settings") settings.enter();
  if (room === "chat") chat.enter();
}

const theme = () => THEMES.find((name) => name === load("theme", "")) ?? "auto";

function showTheme() {
  if (theme() === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme();
  byId("theme").textContent = `Theme: ${theme()}`;
}

let again;

/** What the lamp says: the model's name, or why there is none; asks again while there is none. */
async function look() {
  clearTimeout(again);
  const lamp = byId("model");
  try {
    const { data } = await get("v1/models");
    settings.setModels(data);
    lamp.dataset.state = "ready";
    byId("model-name").textContent = data[0]?.id ?? "no model";
  } catch (error) {
    const words = { offline: "no server", key: "key needed", busy: "loading", worker: "restarting" };
    lamp.dataset.state = error.kind === "offline" || error.kind === "key" ? "off" : "waiting";
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
document.addEventListener("sfumato:look", look); // after every answer and trouble: what it told may be old
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
settings.start({ onKey: look });
chat.start();
editor.start();
sudoku.start();
addEventListener("hashchange", enter);
enter();
look();

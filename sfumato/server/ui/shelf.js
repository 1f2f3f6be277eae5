// The shelf of chats: search, open, rename, delete with undo, export and import.

import { announce, byId, el } from "./dom.js";
import * as history from "./history.js";
import { toast } from "./toast.js";
import { fileName, fromJson, offer, toJson, toMarkdown } from "./transfer.js";

const MOST = 200;
let acts; // {current(), open(id, messageId), opened(ids)…}: what chat.js does
let shown = MOST;

export function showShelf() {
  const text = byId("search").value.trim();
  const all = text ? history.search(text) : history.list().map((head) => ({ head, message: null }));
  const more = el("li", {}, el("button", { class: "quiet", type: "button", onclick: () => showShelf((shown += MOST)) }, `${all.length - shown} more`));
  byId("chats").replaceChildren(...all.slice(0, shown).map((one) => item(one, text)), ...(all.length > shown ? [more] : []));
  byId("none").hidden = !text || all.length > 0;
  const isEmpty = !history.list().length;
  for (const id of ["delete-all", "search", "export-all"]) byId(id).hidden = isEmpty;
  showRoom();
}

/** Whether all is kept; if not, what can be done about it. */
function showRoom() {
  byId("full").hidden = history.isAllSaved();
}

function item({ head, message }, text) {
  const title = history.titleOf(head);
  const isCurrent = head.id === acts.current().id;
  const row = el("li", { class: isCurrent ? "current" : null });
  const rename = () => {
    const field = el("input", { value: title, "aria-label": "New name", maxlength: 120 });
    let isOver = false;
    const close = (isKept) => {
      if (isOver) return;
      isOver = true;
      if (isKept && field.value.trim()) history.rename(head.id, field.value.trim());
      showShelf();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === "Escape") close(event.key === "Enter");
    });
    field.addEventListener("blur", () => close(true));
    row.replaceChildren(field);
    field.select();
  };
  row.append(
    el("button", { class: "title", type: "button", dir: "auto", "aria-current": isCurrent ? "true" : null, onclick: () => acts.open(head.id, message?.id) }, title, text && message ? snippet(message.content, text) : null),
    el("button", { class: "quiet small", type: "button", "aria-label": `Rename ${title}`, title: "Rename", onclick: rename }, "✎"),
    el("button", { class: "quiet small", type: "button", "aria-label": `Delete ${title}`, title: "Delete", onclick: () => remove([head.id], `“${title}” is deleted.`) }, "×"),
  );
  return row;
}

function snippet(content, text) {
  const at = content.toLowerCase().indexOf(text.toLowerCase());
  const from = Math.max(0, at - 16);
  return el("small", {}, from ? "…" : "", content.slice(from, at), el("mark", {}, content.slice(at, at + text.length)), content.slice(at + text.length, at + text.length + 40));
}

function remove(ids, words) {
  const wasOpen = ids.includes(acts.current().id) ? acts.current().id : null;
  history.remove(ids);
  if (wasOpen) acts.open(null);
  const undo = () => {
    history.restore(ids);
    if (wasOpen) acts.open(wasOpen);
    showShelf();
    byId("new-chat").focus();
  };
  toast(words, "Undo", undo, () => {
    history.purge(ids);
    showShelf();
  }).focus();
  showShelf();
}

/** Another tab has deleted the open chat. */
export function tellDeleted(id) {
  acts.open(null);
  toast("This chat was deleted in another tab.", "Undo", () => {
    history.restore([id]);
    acts.open(id);
  });
}

async function bringIn(file) {
  try {
    const { chats, refused } = fromJson(await file.text());
    chats.forEach(history.put);
    announce(`${chats.length} chats are taken in.`);
    byId("import-note").textContent = `${chats.length} taken${refused ? `, ${refused} refused: not whole` : ""}.`;
  } catch (error) {
    byId("import-note").textContent = error.message;
  }
  showShelf();
}

const whole = () => history.list().map(({ id }) => history.find(id));
const exportAll = () => offer("sfumato-chats.json", toJson(whole()), "application/json");

export function start(handlers) {
  acts = handlers;
  let timer;
  byId("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(showShelf, 120);
  });
  byId("delete-all").addEventListener("click", () => {
    const ids = history.list().map(({ id }) => id);
    remove(ids, `${ids.length} ${ids.length === 1 ? "chat is" : "chats are"} deleted.`);
  });
  const title = () => history.titleOf(history.list().find(({ id }) => id === acts.current().id) ?? {});
  byId("export-markdown").addEventListener("click", () => offer(fileName(title(), "md"), toMarkdown({ ...acts.current(), title: title() }), "text/markdown"));
  byId("export-json").addEventListener("click", () => offer(fileName(title(), "json"), toJson([acts.current()]), "application/json"));
  byId("export-all").addEventListener("click", exportAll);
  byId("full-export").addEventListener("click", exportAll);
  byId("import").addEventListener("change", () => {
    const [file] = byId("import").files;
    if (file) bringIn(file);
    byId("import").value = "";
  });
  document.addEventListener("sfumato:saved", showRoom);
  addEventListener("beforeunload", (event) => {
    if (!history.isAllSaved()) event.preventDefault();
  });
  const handle = byId("shelf-handle");
  handle.addEventListener("click", () => {
    const isOpen = byId("chat").classList.toggle("shelf-open");
    handle.setAttribute("aria-expanded", String(isOpen));
  });
}

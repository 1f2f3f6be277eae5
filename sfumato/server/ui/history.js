// Chats kept in this browser: an entry for each message and one for each chat's head, so that two tabs that write at the
// same time write different entries. What the browser has no room for stays in this tab, and is tried again.

import { forget, kept, load, save } from "./store.js";
import { checkedChat, checkedHead, checkedMessage, newId } from "./tree.js";

const HEAD = "head.";
const MESSAGE = "message.";
const FORGOTTEN_AFTER = 60_000; // ms: another tab may still offer to undo a deletion

const unsaved = new Map(); // name -> value

const read = (name) => unsaved.get(name) ?? load(name, {});
const names = (prefix) => [...new Set([...kept(), ...unsaved.keys()])].filter((name) => name.startsWith(prefix));

function headOf(id) {
  const value = read(HEAD + id);
  return Object.keys(value).length ? checkedHead(value, id) : null;
}

export const isAllSaved = () => unsaved.size === 0;

function write(name, value) {
  unsaved.delete(name);
  if (save(name, value)) flush();
  else unsaved.set(name, value);
  globalThis.document?.dispatchEvent(new Event("sfumato:saved"));
}

/** Try again what had no room. */
function flush() {
  for (const [name, value] of [...unsaved]) if (save(name, value)) unsaved.delete(name);
}

function erase(name) {
  unsaved.delete(name);
  forget(name);
}

const heads = () => names(HEAD).map((name) => checkedHead(read(name), name.slice(HEAD.length))).filter(Boolean);

/** The heads of all chats, newest first. */
export const list = () => heads().filter((head) => !head.deleted).sort((one, other) => other.updated - one.updated);

export function find(id) {
  const head = headOf(id);
  if (!head || head.deleted) return null;
  const { first: _, ...chat } = head;
  const messages = names(`${MESSAGE}${id}.`).map((name) => checkedMessage(read(name))).filter(Boolean).sort((one, other) => one.at - other.at);
  const byId = new Map(messages.map((message) => [message.id, message]));
  return { ...chat, leaf: byId.has(chat.leaf) ? chat.leaf : (messages.at(-1)?.id ?? null), messages: byId };
}

const begin = (text) => text.trim().replace(/\s+/g, " ").slice(0, 80);

/** Keep a chat's head and one of its messages; all of them if the browser has none of the chat. */
export function keep(chat, message = null) {
  chat.updated = Date.now();
  const head = headOf(chat.id);
  const first = [...chat.messages.values()].find((one) => one.role === "user");
  const { messages, ...own } = chat;
  for (const one of head ? [message].filter(Boolean) : messages.values()) write(`${MESSAGE}${chat.id}.${one.id}`, one);
  write(HEAD + chat.id, { ...head, ...own, title: head?.title ?? chat.title, first: begin(first?.content ?? "") });
}

function change(ids, fields) {
  for (const id of ids) {
    const head = headOf(id);
    if (head) write(HEAD + id, { ...head, ...fields });
  }
}

export const rename = (id, title) => change([id], { title });

/** Delete chats in a way that can be undone, until they are purged. */
export const remove = (ids) => change(ids, { deleted: Date.now() });
export const restore = (ids) => change(ids, { deleted: undefined });

export function purge(ids) {
  for (const id of ids.filter((one) => headOf(one)?.deleted)) {
    for (const name of names(`${MESSAGE}${id}.`)) erase(name);
    erase(HEAD + id);
  }
  flush();
}

/** Put a chat from elsewhere beside those that are here; one that contradicts its namesake becomes another. */
export function put(chat) {
  const here = find(chat.id);
  const all = [...chat.messages.values()];
  const isOther = (message) => here?.messages.has(message.id) && here.messages.get(message.id).content !== message.content;
  const mine = all.some(isOther) || (!here && headOf(chat.id)) ? { ...chat, id: newId() } : { ...chat };
  if (here && mine.id === chat.id) for (const message of all) if (!here.messages.has(message.id)) write(`${MESSAGE}${mine.id}.${message.id}`, message);
  keep(mine);
  change([mine.id], { updated: chat.updated });
}

/** Chats of an earlier page, which kept all in one entry; and what was deleted long enough ago is forgotten. */
export function tidy() {
  const olds = load("chats", []);
  for (const [at, old] of olds.entries()) {
    const chat = checkedChat(old);
    if (chat) put(chat);
    if (isAllSaved()) continue;
    save("chats", olds.slice(at + 1)); // there is no room for both
    flush();
    if (!isAllSaved()) {
      save("chats", olds.slice(at));
      break;
    }
  }
  if (isAllSaved()) forget("chats");
  purge(heads().filter(({ deleted }) => deleted < Date.now() - FORGOTTEN_AFTER).map(({ id }) => id));
}

/** The chats in which a text stands, in the title or in a message: [{head, message}], newest first. */
export function search(text) {
  const wanted = text.toLowerCase();
  return list().flatMap((head) => {
    const message = [...find(head.id).messages.values()].find(({ content }) => content.toLowerCase().includes(wanted)) ?? null;
    return message || titleOf(head).toLowerCase().includes(wanted) ? [{ head, message }] : [];
  });
}

/** What an entry of the storage holds that another tab has written: {id, head}, {id, message}, or null. */
export function entryOf(key) {
  const name = (key ?? "").replace(/^sfumato\./, "");
  if (name.startsWith(HEAD)) return { id: name.slice(HEAD.length), head: headOf(name.slice(HEAD.length)) };
  if (!name.startsWith(MESSAGE)) return null;
  return { id: name.split(".")[1], message: checkedMessage(load(name, {})) };
}

/** A chat's name: the one given, or the beginning of its first message. */
export function titleOf(head) {
  const first = head.first ?? "";
  return head.title || (first.length > 48 ? `${first.slice(0, 47)}…` : first) || "New chat";
}

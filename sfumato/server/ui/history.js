// Chats kept in this browser: newest first, at most MOST of them, the oldest given up where the browser is full.

import { forget, load, save } from "./store.js";

const MOST = 60;

const isCall = (call) => typeof call?.function?.name === "string";

const isMessage = (message) => typeof message?.role === "string" && typeof message.content === "string"
  && (message.tool_calls === undefined || (Array.isArray(message.tool_calls) && message.tool_calls.every(isCall)));

const isChat = (chat) => typeof chat?.id === "string" && typeof chat.title === "string"
  && Array.isArray(chat.messages) && chat.messages.every(isMessage);

const read = () => load("chats", []).filter(isChat);

function write(chats) {
  let kept = chats.slice(0, MOST);
  while (!save("chats", kept) && kept.length > 1) kept = kept.slice(0, -1);
}

export const list = () => read();
export const find = (id) => read().find((chat) => chat.id === id) ?? null;

/** Keep a chat and put it first. Read anew each time: another tab may have written meanwhile. */
export function keep(chat) {
  write([{ ...chat, updated: Date.now() }, ...read().filter((other) => other.id !== chat.id)]);
}

export function rename(id, title) {
  write(read().map((chat) => (chat.id === id ? { ...chat, title } : chat)));
}

export function remove(id) {
  write(read().filter((chat) => chat.id !== id));
}

export function removeAll() {
  forget("chats");
}

export function fresh() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", updated: Date.now(), messages: [] };
}

/** A chat's name: the one given, or the beginning of its first message. */
export function titleOf(chat) {
  if (chat.title) return chat.title;
  const first = chat.messages.find((message) => message.role === "user")?.content.trim().replace(/\s+/g, " ") ?? "";
  return first.length > 48 ? `${first.slice(0, 47)}…` : first || "New chat";
}

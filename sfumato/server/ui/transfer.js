// Chats as files: JSON to keep and to bring back, Markdown to read. What is brought in is checked as a stranger's.

import { el } from "./dom.js";
import { titleOf } from "./history.js";
import { checkedChat, pathTo } from "./tree.js";

const FORMAT = "sfumato-chats";
const MOST_BYTES = 64 * 1024 * 1024;
const MOST_CHATS = 5000;

export const toJson = (chats) => `${JSON.stringify({ format: FORMAT, version: 1, chats: chats.map((chat) => ({ ...chat, messages: [...chat.messages.values()] })) }, null, 1)}\n`;

/** The shown path of a chat. */
export function toMarkdown(chat) {
  const path = pathTo(chat);
  const names = { user: "You", assistant: "Answer", tool: "Result" };
  const partOf = ({ role, content, note, draft, tool_calls: calls = [] }) => [`## ${names[role]}`, content,
    ...calls.map((call) => `\`${call.function.name}(${call.function.arguments})\``),
    ...(draft ? [`> Draft, not decided: ${draft.pieces.slice(0, draft.end).join("").replace(/\n/g, "\n> ")}`] : []), ...(note ? [`*${note}*`] : [])];
  const first = path.find(({ role }) => role === "user")?.content.trim().split("\n")[0].slice(0, 80);
  const parts = [`# ${titleOf({ ...chat, first })}`, ...(chat.system ? [`> ${chat.system.replace(/\n/g, "\n> ")}`] : []), ...path.flatMap(partOf)];
  return `${parts.filter(Boolean).join("\n\n")}\n`;
}

/** The chats of a file, and how many of its entries are none; throws a sentence for a file that holds none. */
export function fromJson(text) {
  if (text.length > MOST_BYTES) throw new Error(`The file is larger than ${MOST_BYTES / 2 ** 20} MiB.`);
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON; give one that this page has exported.");
  }
  const all = Array.isArray(value) ? value : value?.format === FORMAT ? value.chats : null;
  if (!Array.isArray(all)) throw new Error("The file holds no chats of this page; give one that it has exported as JSON.");
  if (all.length > MOST_CHATS) throw new Error(`The file holds ${all.length} chats; at most ${MOST_CHATS} are taken at once.`);
  const chats = all.map(checkedChat).filter(Boolean);
  if (!chats.length) throw new Error("No chat of the file is whole; nothing was taken.");
  return { chats, refused: all.length - chats.length };
}

/** Give the user a file. */
export function offer(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

export const fileName = (title, ending) => `${title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "chat"}.${ending}`;

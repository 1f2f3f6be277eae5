// A chat is a tree of messages: each knows its parent, and what is shown is the path to the chosen leaf. Here is what may
// be said of a tree, and the check of one that comes from outside: the browser's storage, a file, an older page.

const ID = /^[\w-]{1,64}$/;
const MOST_MESSAGES = 20000;
const MOST_PIECES = 16384;

export const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 10);

export function freshChat() {
  return { id: newId(), title: "", system: null, updated: Date.now(), leaf: null, messages: new Map() };
}

/** A message with its place: behind `parent`. */
export const placed = (message, parent) => Object.assign(message, { id: message.id ?? newId(), parent, at: message.at ?? Date.now() });

/** A message put behind the chosen leaf, or behind `parent`, and chosen. */
export function add(chat, message, parent = chat.leaf) {
  placed(message, parent);
  chat.messages.set(message.id, message);
  chat.leaf = message.id;
  return message;
}

/** The messages from the first one to `leaf`. */
export function pathTo(chat, leaf = chat.leaf) {
  const path = [];
  for (let one = chat.messages.get(leaf); one && path.length < chat.messages.size; one = chat.messages.get(one.parent)) path.push(one);
  return path.reverse();
}

const byAge = (one, other) => one.at - other.at || (one.id < other.id ? -1 : 1);

/** The versions of a message: all that stand behind its parent, oldest first. */
export const versions = (chat, message) => [...chat.messages.values()].filter((other) => other.parent === message.parent).sort(byAge);

/** The leaf to show for a message: the newest behind it. */
export function leafOf(chat, id) {
  const newest = new Map();
  for (const one of [...chat.messages.values()].sort(byAge)) newest.set(one.parent, one.id);
  let leaf = id;
  for (let left = chat.messages.size; newest.has(leaf) && left > 0; left--) leaf = newest.get(leaf);
  return leaf;
}

const isText = (value) => typeof value === "string";
const isId = (value) => isText(value) && ID.test(value);
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const isRecord = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const pick = (value, names, is) => Object.fromEntries(names.filter((name) => is(value[name])).map((name) => [name, value[name]]));

function checkedCalls(calls) {
  const isCall = (call) => isText(call?.function?.name) && isText(call.function.arguments ?? "");
  if (!Array.isArray(calls) || !calls.every(isCall)) return null;
  return calls.map(({ id, function: { name, arguments: text = "" } }) => ({ ...(isText(id) ? { id } : {}), function: { name, arguments: text } }));
}

const PLACE = { canvas: 0, step: 0, end: 0, before: 0 };

function checkedDraft(draft) {
  if (!isRecord(draft) || ![draft.pieces, draft.entropies, draft.accepted].every(Array.isArray)) return null;
  const { length } = draft.pieces;
  if (length > MOST_PIECES || draft.entropies.length !== length || draft.accepted.length !== length) return null;
  if (!draft.pieces.every(isText) || !draft.entropies.every(isNumber)) return null;
  return { ...PLACE, ...pick(draft, Object.keys(PLACE), isNumber), pieces: draft.pieces, entropies: draft.entropies, accepted: draft.accepted.map(Boolean) };
}

/** What is known of a message, if it is one; else null. */
export function checkedMessage(value) {
  if (!isRecord(value) || !isText(value.content) || !["user", "assistant", "tool"].includes(value.role)) return null;
  if (!isId(value.id) || !(value.parent === null || isId(value.parent)) || value.parent === value.id) return null;
  const message = { ...pick(value, ["id", "role", "content", "thought", "tool_call_id", "name", "note"], isText), parent: value.parent, at: isNumber(value.at) ? value.at : 0 };
  if (value.tool_calls !== undefined) {
    message.tool_calls = checkedCalls(value.tool_calls);
    if (!message.tool_calls) return null;
  }
  if (isRecord(value.usage)) message.usage = pick(value.usage, Object.keys(value.usage).slice(0, 20).filter((name) => name !== "__proto__"), isNumber);
  const draft = value.draft && checkedDraft(value.draft);
  if (draft) message.draft = draft;
  return message;
}

/** A chat's own fields, without its messages. */
export const checkedHead = (value, id) => (isRecord(value) ? {
  id,
  title: isText(value.title) ? value.title.slice(0, 200) : "",
  first: isText(value.first) ? value.first.slice(0, 200) : "",
  system: isText(value.system) ? value.system : null,
  updated: isNumber(value.updated) ? value.updated : 0,
  leaf: isText(value.leaf) ? value.leaf : null,
  ...(isNumber(value.deleted) ? { deleted: value.deleted } : {}),
} : null);

/** A whole chat, if it is one, else null; also one of the page's earlier form, where messages were a list. */
export function checkedChat(value) {
  if (!isRecord(value) || !isId(value.id) || !isText(value.title) || !Array.isArray(value.messages)) return null;
  if (value.messages.length > MOST_MESSAGES) return null;
  const isOld = value.messages.every((message) => message?.id === undefined);
  const messages = new Map();
  for (const [at, message] of value.messages.entries()) {
    const old = isOld && isRecord(message) ? { ...message, id: `m${at}`, parent: at ? `m${at - 1}` : null, at } : message;
    const checked = checkedMessage(old);
    if (!checked || messages.has(checked.id) || !(checked.parent === null || messages.has(checked.parent))) return null;
    messages.set(checked.id, checked);
  }
  const { first: _, deleted: __, ...head } = checkedHead(value, value.id);
  const leaf = messages.has(head.leaf) ? head.leaf : ([...messages.keys()].at(-1) ?? null);
  return { ...head, leaf, messages };
}

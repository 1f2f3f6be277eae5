// The editor: a text, and two ways to have a part of it written: fill the middle, rewrite in place. A proposal stands in
// the text's stead until it is accepted or rejected.

import { ApiError, stream } from "./api.js";
import { Gauge, drawPieces } from "./canvas.js";
import { diff } from "./diff.js";
import { announce, byId, el } from "./dom.js";
import * as settings from "./settings.js";
import { keepTyped, load, save } from "./store.js";
import { trouble } from "./trouble.js";

let running = null;
let proposed = null; // {old, text, from, to}: the two texts, and what to select in the new one
const changes = []; // {before, after}, for undo

const field = () => byId("text");

/** The server counts characters, JavaScript UTF-16 units. */
const characters = (text) => [...text].length;

function infill() {
  const { value, selectionStart: from, selectionEnd: to } = field();
  const [prefix, suffix] = [value.slice(0, from), value.slice(to)];
  const atMost = byId("at-most").valueAsNumber;
  work("v1/infill", { prefix, suffix, ...(Number.isInteger(atMost) ? { at_most: atMost } : {}) }, prefix, suffix, infill);
}

function rewrite() {
  const { value, selectionStart: from, selectionEnd: to } = field();
  const instruction = byId("instruction").value.trim();
  if (!value) return say("There is no text yet.", field());
  if (from === to && !instruction) return say("Select a passage, or say what to change.", byId("instruction"));
  const body = { text: value, strength: byId("strength").valueAsNumber, ...(instruction ? { instruction } : {}) };
  if (from === to) return work("v1/edit", body, "", "", rewrite);
  const start = characters(value.slice(0, from));
  const spans = [[start, start + characters(value.slice(from, to))]];
  return work("v1/edit", { ...body, spans }, value.slice(0, from), value.slice(to), rewrite);
}

function say(words, place) {
  byId("editor-trouble").replaceChildren(el("p", { class: "wrong", role: "alert" }, words));
  place.focus();
}

/** Send, draw drafts between `before` and `after`, and show what comes as a proposal. */
async function work(path, body, before, after, again) {
  if (running || proposed) return;
  const { value: old, selectionStart: from, selectionEnd: to } = field();
  const control = new AbortController();
  running = control;
  byId("editor-trouble").replaceChildren();
  const canvases = new Map();
  const gauge = new Gauge((frame) => (frame ? drawDraft(frame) : drawProposal()));
  const drawDraft = (frame) => {
    const shown = [...canvases.entries()].filter(([canvas]) => canvas < frame.canvas).map(([, last]) => last).concat(frame);
    showDraft(before, after, shown);
  };
  byId("editor-gauge").replaceChildren(gauge.root);
  showPlace(el("span", {}, old));
  announce("The model is writing.");
  let result = null;
  try {
    for await (const found of stream(path, { ...settings.request({ isTemplate: true }), ...body }, control.signal)) {
      if (found.draft) {
        canvases.set(found.draft.canvas, found.draft);
        gauge.add(found.draft);
      } else result = found;
    }
    if (!result) throw new ApiError("broken", "The answer held no text.");
  } catch (error) {
    running = null;
    gauge.pause();
    hidePlace();
    byId("editor-gauge").replaceChildren();
    field().focus();
    field().setSelectionRange(from, to);
    if (error.name === "AbortError") return announce("Stopped. The text is as it was.");
    const retry = () => {
      field().setSelectionRange(from, to);
      again();
    };
    return byId("editor-trouble").replaceChildren(trouble(error, retry));
  } finally {
    running = null;
    document.dispatchEvent(new Event("sfumato:look"));
  }
  propose(old, result, before, after);
  gauge.finish(result.usage);
  drawProposal();
}

const overlap = (tail, head) => {
  for (let length = Math.min(tail.length, head.length); length; length--) if (head.startsWith(tail.slice(-length))) return length;
  return 0;
};

/** The text with canvases in it. Fixed text may stand on the canvas as well: it is shown once. */
function showDraft(before, after, frames) {
  const shown = frames.map((frame) => frame.pieces.slice(0, frame.end || frame.pieces.length).join("")).join("");
  const lead = before.slice(0, before.length - overlap(before, shown));
  const rest = after.slice(overlap(shown, after));
  const canvases = frames.map((frame) => {
    const box = el("span", { class: "canvas" });
    const end = frame.end || frame.pieces.length;
    drawPieces(box, { ...frame, pieces: frame.pieces.slice(0, end) });
    return box;
  });
  showPlace(el("span", { class: "fixed" }, lead), ...canvases, el("span", { class: "fixed" }, rest));
}

function propose(old, result, before, after) {
  const isBetween = result.text.startsWith(before) && result.text.endsWith(after) && result.text.length >= before.length + after.length;
  const [head, tail] = isBetween ? [before, after] : ["", ""];
  const from = head.length;
  const to = result.text.length - tail.length;
  proposed = { old, text: result.text, from, to, parts: partsOf(old, result, head, tail) };
  byId("judgement").hidden = false;
  byId("proposal").focus();
  announce(old === result.text ? "Nothing would change." : "A proposal stands in the text. Enter accepts, Escape rejects.");
}

function partsOf(old, result, head, tail) {
  const [was, is] = [old.slice(head.length, old.length - tail.length), result.text.slice(head.length, result.text.length - tail.length)];
  const middle = result.object === "infill" ? [["old", was], ["new", is]] : diff(was, is);
  return [["same", head], ...middle, ["same", tail]].filter(([, text]) => text);
}

function drawProposal() {
  if (!proposed) return;
  const tags = { same: "span", old: "del", new: "ins" };
  const nodes = proposed.parts.map(([kind, text]) => el(tags[kind], {}, text));
  if (proposed.old === proposed.text) nodes.push(el("p", { class: "hint" }, "Nothing would change."));
  showPlace(...nodes);
}

function showPlace(...nodes) {
  const place = byId("proposal");
  if (place.hidden) place.style.minHeight = `${field().offsetHeight}px`;
  place.replaceChildren(...nodes);
  if (place.hidden) {
    place.hidden = false;
    place.focus(); // before the field goes, so that the keys still come here
    field().hidden = true;
  }
  showButtons();
}

function hidePlace() {
  byId("proposal").hidden = true;
  byId("judgement").hidden = true;
  field().hidden = false;
  showButtons();
}

function decide(isAccepted) {
  if (!proposed) return;
  const { old, text, from, to } = proposed;
  proposed = null;
  hidePlace();
  byId("editor-gauge").replaceChildren();
  if (isAccepted && text !== old) {
    changes.push({ before: old, after: text });
    put(text);
    field().setSelectionRange(from, to);
  }
  field().focus();
  announce(isAccepted ? "Accepted." : "Rejected. The text is as it was.");
  showButtons();
}

function undo() {
  const change = changes.at(-1);
  if (!change || proposed || running) return;
  if (field().value !== change.after) return say("The text was changed since; undo that first.", field());
  changes.pop();
  put(change.before);
  field().focus();
  announce("Undone.");
  return showButtons();
}

function put(text) {
  field().value = text;
  save("editor", text);
}

function showButtons() {
  const isAway = Boolean(running || proposed);
  byId("infill").disabled = isAway;
  byId("rewrite").disabled = isAway;
  byId("editor-stop").hidden = !running;
  byId("undo").disabled = isAway || changes.length === 0;
  const { selectionStart, selectionEnd } = field();
  const hasSelection = selectionStart !== selectionEnd;
  byId("rewrite").textContent = hasSelection ? "Rewrite the selection" : "Rewrite the text";
  byId("infill").textContent = hasSelection ? "Fill in place of the selection" : "Fill at the cursor";
}

export function start() {
  keepTyped(field(), "editor");
  keepTyped(byId("instruction"), "instruction");
  byId("strength").value = load("strength", 0.5);
  const showStrength = () => {
    byId("strength-shown").textContent = byId("strength").value;
    save("strength", byId("strength").valueAsNumber);
  };
  byId("strength").addEventListener("input", showStrength);
  showStrength();
  byId("editor-tools").addEventListener("submit", (event) => event.preventDefault());
  byId("infill").addEventListener("click", infill);
  byId("rewrite").addEventListener("click", rewrite);
  byId("undo").addEventListener("click", undo);
  byId("accept").addEventListener("click", () => decide(true));
  byId("reject").addEventListener("click", () => decide(false));
  byId("editor-stop").addEventListener("click", () => running?.abort());
  for (const event of ["select", "keyup", "pointerup", "input"]) field().addEventListener(event, showButtons);
  byId("proposal").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && proposed) {
      event.preventDefault();
      decide(true);
    }
  });
  byId("editor").addEventListener("keydown", (event) => {
    const isCommand = event.ctrlKey || event.metaKey;
    if (event.key === "Escape") {
      if (running) running.abort();
      else decide(false);
    } else if (isCommand && event.key === "Enter") {
      event.preventDefault();
      if (event.shiftKey) rewrite();
      else infill();
    } else if (isCommand && event.key === "z" && event.target === field() && changes.at(-1)?.after === field().value) {
      event.preventDefault();
      undo();
    }
  });
  showButtons();
}

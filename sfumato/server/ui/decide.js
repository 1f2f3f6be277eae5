// Decide: questions with given answers about a state, answered as it is written. Only questions whose answer would be
// another one are asked: an answer follows from the state, the settings and the question itself.

import { ApiError, key as apiKey, post } from "./api.js";
import { readAnswer } from "./bars.js";
import { Card } from "./card.js";
import { announce, byId, el } from "./dom.js";
import { copy } from "./prose.js";
import { Raw, above, blank, checkedQuestions, conditionOf, fromRequest, json, keyOf, lack, recordOf } from "./questions.js";
import { EXAMPLES } from "./samples.js";
import * as settings from "./settings.js";
import { SNIPPETS } from "./snippets.js";
import { load, save } from "./store.js";
import { toast } from "./toast.js";
import { trouble } from "./trouble.js";

const PAUSE = 350; // ms without a change before it asks
const SOON = 300; // ms after which an answer that has not come can be stopped
const MOST_BYTES = 4 * 2 ** 20; // of a file
const FIELDS = ["samples", "steps", "think", "threshold", "seed", "calibrated"];

let cards = [];
let running = null;
let timer;
let frame = { text: "", number: 0 }; // what all answers follow from beside their question

const field = () => byId("state");
const all = () => cards.map(({ question }) => question);
const option = (name) => byId(`decide-${name}`);

// ---- what is asked ---------------------------------------------------------------------------------------------------

/** The state as it is sent; throws what is wrong with it. */
function state() {
  const { value } = field();
  if (!byId("state-json").checked) return value;
  let parsed;
  try {
    parsed = JSON.parse(value);
  } catch (error) {
    throw new Error(`This is not JSON: ${error.message}`);
  }
  if (!parsed || typeof parsed !== "object") throw new Error("Give an object or an array, or send it as text.");
  return new Raw(value);
}

/** The settings that differ from what the server does without them, as [name, value]. */
function extras() {
  const number = (name) => option(name).valueAsNumber;
  const pairs = ["samples", "steps"].filter((name) => Number.isInteger(number(name)) && number(name) !== 1).map((name) => [name, number(name)]);
  const think = option("think").value;
  if (think !== "never") pairs.push(["think", think]);
  if (think === "auto" && Number.isFinite(number("threshold"))) pairs.push(["threshold", number("threshold")]);
  if (!option("calibrated").checked) pairs.push(["calibrated", false]);
  if (Number.isInteger(number("seed"))) pairs.push(["seed", number("seed")]);
  return [...pairs, ...settings.changes().filter(([name]) => name === "adapter")].map(([name, value]) => [`x_${name}`, value]);
}

function bodyOf(questions) {
  const record = (one) => {
    const condition = conditionOf(one, all());
    return new Map([...recordOf(one), ...(condition ? [["x_depends_on", condition]] : [])]);
  };
  return new Map([
    ["model", settings.model() ?? "jev-latest"],
    ["state", state()],
    ["questions", new Map(questions.map((one) => [one.id, record(one)]))],
    ...extras(),
  ]);
}

/** The key of a card's answer under the state and the settings of now. */
function keys() {
  const text = json([settings.model() ?? "", byId("state-json").checked, field().value, ...extras()]);
  if (text !== frame.text) frame = { text, number: frame.number + 1 };
  return (card) => `${frame.number} ${keyOf(card.question, all())}`;
}

/** What each card lacks is said there; the cards that can be asked and whose answer is not known. */
function open(keyOfCard) {
  for (const card of cards) {
    card.showLack(lack(card.question, all()));
    if (card.refusal && card.refusal !== keyOfCard(card)) {
      card.refusal = null;
      card.refuse("");
    }
  }
  const isRefused = (question) => cards.some((card) => card.question === question && card.refusal);
  return cards.filter((card) => !lack(card.question, all()) && ![card.question, ...above(card.question, all())].some(isRefused) && card.key !== keyOfCard(card));
}

// ---- asking ------------------------------------------------------------------------------------------------------------

/** End what is under way: what comes next answers for it. */
function cancel() {
  clearTimeout(timer);
  running?.abort();
  running = null;
  showButtons();
}

function change() {
  keep();
  cancel();
  const keyOfCard = keys();
  const some = open(keyOfCard);
  for (const card of cards) card.bars.isStale = card.key !== null && card.key !== keyOfCard(card);
  mark();
  drawCode();
  showStatus(some.length && field().value.trim() && !byId("live").checked ? "Not asked yet." : "");
  if (byId("live").checked) timer = setTimeout(() => ask(false), PAUSE);
}

/** Ask what is not answered yet. `isOwn`: a person has asked for it, so that what hinders is told. */
async function ask(isOwn = true) {
  cancel();
  if (!isOwn && (byId("decide").hidden || !settings.model())) return;
  byId("decide-trouble").replaceChildren();
  sayWrong("");
  for (const name of FIELDS) option(name).removeAttribute("aria-invalid");
  if (!field().value.trim()) {
    if (isOwn) field().focus();
    return showStatus(isOwn ? "Write or paste a state first." : "");
  }
  const keyOfCard = keys();
  const some = open(keyOfCard);
  if (!some.length) return isOwn && showStatus(cards.length ? "Every question that can be asked is answered." : "Add a question first.");
  const questions = [...new Set(some.flatMap((card) => [...above(card.question, all()).reverse(), card.question]))];
  const control = new AbortController();
  try {
    const body = json(bodyOf(questions));
    running = control;
    setTimeout(showButtons, SOON);
    showStatus(`Reading ${questions.length === 1 ? "one question" : `${questions.length} questions`}…`);
    const start = performance.now();
    const answered = new Map(cards.map((card) => [card, keyOfCard(card)]));
    const answer = await post("v1/systemone", body, control.signal);
    if (running !== control) return;
    take(answer, questions, answered, performance.now() - start);
  } catch (error) {
    if (error.name === "AbortError") {
      if (running === control) showStatus("Stopped.");
    } else if (error.name !== "ApiError") sayWrong(error.message); // the state's own
    else if (running === control) refuse(error, questions, keyOfCard);
  } finally {
    if (running === control) running = null;
    showButtons();
  }
  document.dispatchEvent(new Event("sfumato:look"));
}

function take(answer, questions, answered, spent) {
  const asked = cards.filter((card) => questions.includes(card.question));
  const readings = asked.map((card) => {
    const one = Object.hasOwn(answer.answers ?? {}, card.question.id) ? answer.answers[card.question.id] : null;
    const isSkipped = Boolean(card.question.parent) && one === null;
    return isSkipped ? null : readAnswer(one, card.question);
  });
  asked.forEach((card, at) => {
    card.key = answered.get(card);
    card.reading = readings[at];
    if (card.reading) card.bars.show(card.reading, card.question);
    else card.bars.say(`Not asked, as ${[...conditionOf(card.question, all()).keys()]} has another answer.`);
  });
  mark();
  const tokens = answer.usage?.input_tokens;
  showStatus(`${asked.length === 1 ? "One answer" : `${asked.length} answers`} in ${Math.round(spent)} ms${Number.isInteger(tokens) ? `, ${tokens} tokens read` : ""}.`);
  const words = asked.filter(({ reading }) => reading).slice(0, 4).map(({ question, reading }) => `${question.id}: ${question.kind === "noul" ? (reading.top === "true" ? "yes" : "no") : reading.top}`);
  announce(words.join(", "));
}

/** An error stands at the question that it names; the others are asked without that one. */
function refuse(error, questions, keyOfCard) {
  showStatus("");
  const named = error.details.map(({ loc, msg }) => [cards.find(({ question }) => loc[1] === "questions" && loc[2] === question.id && questions.includes(question)), msg, loc]);
  const isAllNamed = named.length && named.every(([card]) => card);
  for (const [card, words, loc] of named) {
    if (card) {
      card.refusal = keyOfCard(card);
      card.refuse(words, loc.slice(3));
      announce(`${card.question.id}: ${words}`);
    } else if (loc[1] === "state") sayWrong(words);
    else if (String(loc[1]).startsWith("x_")) option(loc[1].slice(2))?.setAttribute("aria-invalid", "true");
  }
  if (isAllNamed && open(keyOfCard).length) timer = setTimeout(() => ask(false));
  else if (!isAllNamed && !named.some(([, , loc]) => loc[1] === "state")) byId("decide-trouble").replaceChildren(trouble(error, ask));
}

const stop = () => running?.abort();

// ---- what is shown -----------------------------------------------------------------------------------------------------

function showStatus(words) {
  byId("decide-status").textContent = words;
}

function sayWrong(words) {
  byId("state-wrong").textContent = words;
  byId("state-wrong").hidden = !words;
  field().setAttribute("aria-invalid", String(Boolean(words)));
}

function showButtons() {
  const gone = running ? byId("ask") : byId("decide-stop");
  const hasFocus = document.activeElement === gone;
  byId("ask").hidden = Boolean(running);
  byId("decide-stop").hidden = !running;
  if (hasFocus) (running ? byId("decide-stop") : byId("ask")).focus();
  byId("decide-threshold-row").hidden = option("think").value !== "auto";
}

/** From, to: where a passage stands in the state, in JavaScript's units; null where it does not. */
function placeOf(passage, place) {
  const { value } = field();
  if (place && !byId("state-json").checked) {
    const characters = [...value];
    const from = characters.slice(0, place[0]).join("").length;
    if (value.startsWith(passage, from)) return [from, from + passage.length];
  }
  const at = value.indexOf(passage);
  return passage && at >= 0 ? [at, at + passage.length] : null;
}

/** Passages that are quoted are marked behind the state's own text. */
function mark() {
  const quoted = cards.filter(({ question, reading }) => question.kind === "x_span" && reading).map(({ reading }) => placeOf(reading.top, reading.place)).filter(Boolean).sort((a, b) => a[0] - b[0]);
  const { value } = field();
  const nodes = [];
  let at = 0;
  for (const [from, to] of quoted) {
    if (to <= at) continue;
    nodes.push(value.slice(at, Math.max(at, from)), el("mark", {}, value.slice(Math.max(at, from), to)));
    at = to;
  }
  byId("state-marks").replaceChildren(...(nodes.length ? [...nodes, `${value.slice(at)}\n`] : []));
  byId("state-marks").scrollTop = field().scrollTop;
}

function showPassage(passage) {
  const place = placeOf(passage, null);
  if (!place) return;
  field().focus();
  field().setSelectionRange(...place);
}

function drawCode() {
  if (!byId("decide-code").open) return;
  const some = all().filter((one) => !lack(one, all()));
  const where = location.href.replace(/[?#].*$/, "").replace(/\/$/, "");
  let text;
  try {
    text = SNIPPETS[byId("code-form").value]({ body: bodyOf(some), all: some, where, hasKey: Boolean(apiKey()) });
  } catch (error) {
    text = error.message;
  }
  byId("code").firstChild.textContent = text;
}

// ---- what is kept --------------------------------------------------------------------------------------------------------

function work() {
  const values = Object.fromEntries(FIELDS.map((name) => [name, name === "calibrated" ? option(name).checked : option(name).value]));
  return { state: field().value, isJson: byId("state-json").checked, questions: all(), live: byId("live").checked, values };
}

function keep() {
  const value = work();
  save("decide", value, "sessionStorage");
  save("decide", value);
}

/** Put a state and questions in place of those that stand there. */
function put({ state: text, isJson, questions, values = null }) {
  field().value = typeof text === "string" ? text : "";
  byId("state-json").checked = Boolean(isJson);
  for (const name of FIELDS) {
    const value = values?.[name];
    if (name === "calibrated" && typeof value === "boolean") option(name).checked = value;
    else if (typeof value === "string") option(name).value = value;
  }
  cards = [];
  cards = checkedQuestions(questions).map(cardOf);
  for (const card of cards) card.drawCondition();
  drawCards();
}

const cardOf = (question) => new Card(question, { change, settle, remove, all, show: showPassage });

/** A field of a card has its new value: what depends on it offers that. */
function settle(card) {
  for (const other of cards) if (other !== card && other.question.parent) other.drawCondition();
}

function drawCards() {
  byId("questions").replaceChildren(...cards.map(({ root }) => root));
}

function replace(next, words) {
  const before = work();
  const isEmpty = !before.state.trim() && !before.questions.length;
  const go = (value) => {
    put(value);
    showButtons();
    change();
  };
  go(next);
  if (!isEmpty) toast(words, "Undo", () => go(before));
}

function add(kind) {
  let number = cards.length + 1;
  while (all().some(({ id }) => id === `q${number}`)) number++;
  const card = cardOf(blank(kind, `q${number}`));
  cards.push(card);
  drawCards();
  card.instructions.focus();
  change();
}

function remove(card) {
  const at = cards.indexOf(card);
  const below = cards.filter(({ question }) => question.parent === card.question.key);
  for (const { question } of below) question.parent = "";
  cards.splice(at, 1);
  drawCards();
  for (const other of cards) other.drawCondition();
  (cards[Math.min(at, cards.length - 1)]?.id ?? byId("add-noul")).focus();
  change();
  toast(`The question ${card.question.id} is removed.`, "Undo", () => {
    cards.splice(Math.min(at, cards.length), 0, card);
    for (const { question } of below) question.parent = card.question.key;
    drawCards();
    for (const other of cards) other.drawCondition();
    card.id.focus();
    change();
  });
}

/** A file as the state, or as a whole request. */
async function openFile(file) {
  if (!file) return;
  try {
    if (file.size > MOST_BYTES) throw new Error(`The file is larger than ${MOST_BYTES / 2 ** 20} MiB.`);
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    let isJson = true;
    try {
      isJson = typeof JSON.parse(text) === "object";
    } catch {
      isJson = false;
    }
    const request = isJson ? fromRequest(text) : null;
    replace(request ?? { state: text, isJson, questions: all() }, `${file.name} is opened.`);
  } catch (error) {
    sayWrong(error.name === "TypeError" ? `${file.name} is no text.` : error.message);
  }
}

/** The tab is shown: what is not answered is asked. */
export function enter() {
  if (byId("live").checked) ask(false);
}

export function start() {
  byId("code-form").append(...Object.keys(SNIPPETS).map((name) => el("option", {}, name)));
  byId("decide-example").append(...Object.keys(EXAMPLES).map((name) => el("option", {}, name)));
  const kept = load("decide", load("decide", {}), "sessionStorage");
  byId("live").checked = kept.live !== false;
  put(kept);
  showButtons();
  mark();
  for (const event of ["input", "change"]) byId("decide-form").addEventListener(event, () => (showButtons(), change()));
  byId("decide-form").addEventListener("submit", (event) => event.preventDefault());
  field().addEventListener("input", change);
  field().addEventListener("scroll", () => (byId("state-marks").scrollTop = field().scrollTop));
  byId("state-json").addEventListener("change", change);
  byId("live").addEventListener("change", change);
  byId("decide-example").addEventListener("change", () => {
    const name = byId("decide-example").value;
    byId("decide-example").value = "";
    if (name === "empty") replace({ state: "", isJson: false, questions: [] }, "The state and the questions are removed.");
    else if (name) replace({ ...fromRequest(JSON.stringify(EXAMPLES[name])), values: null }, `“${name}” is loaded.`);
  });
  for (const kind of ["noul", "choice", "score", "x_span"]) byId(`add-${kind}`).addEventListener("click", () => add(kind));
  byId("ask").addEventListener("click", () => ask());
  byId("decide-stop").addEventListener("click", stop);
  byId("decide-code").addEventListener("toggle", drawCode);
  byId("code-form").addEventListener("change", drawCode);
  byId("copy-code").addEventListener("click", () => copy(byId("code").textContent, byId("copy-code"), byId("code")));
  byId("state-file").addEventListener("change", (event) => {
    openFile(event.target.files[0]);
    event.target.value = "";
  });
  for (const event of ["dragover", "drop"]) {
    byId("decide").addEventListener(event, (drag) => {
      if (![...drag.dataTransfer.types].includes("Files")) return;
      drag.preventDefault();
      if (event === "drop") openFile(drag.dataTransfer.files[0]);
    });
  }
  byId("decide").addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      ask();
    }
  });
  let model;
  document.addEventListener("sfumato:models", () => {
    if (model === settings.model()) return;
    model = settings.model();
    enter();
  });
}

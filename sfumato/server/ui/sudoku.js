// The Sudoku board: clues are fixed text, blanks are slots of one token, and every draft shows in the cells.

import { ApiError, stream } from "./api.js";
import { Gauge, level } from "./canvas.js";
import { announce, byId, el } from "./dom.js";
import * as settings from "./settings.js";
import { load, save } from "./store.js";
import { trouble } from "./trouble.js";

const SAMPLES = [
  "003604879018970650609528000090700008701089000800356790004107025360890417100400006",
  "090001500302758000710060200029605000504100806130040020400006157257013009900580002",
  "103008000900000071706014008000890000000000206000150893420385009500040730030279580",
  "200800390050209800009003170100700008000021050005908003807500000012000000693180007",
  "013070900070502304000000000320450190050090078000001050130600002780043000060000000",
];

const ALL = Array.from({ length: 81 }, (_, cell) => cell);
const UNIT_OF = {
  row: (cell) => Math.floor(cell / 9),
  column: (cell) => cell % 9,
  box: (cell) => Math.floor(cell / 27) * 3 + Math.floor((cell % 9) / 3),
};
const UNITS = Object.entries(UNIT_OF).flatMap(([name, unitOf]) =>
  ALL.slice(0, 9).map((number) => ({ name, number: number + 1, cells: ALL.filter((cell) => unitOf(cell) === number) })));

let puzzle = "0".repeat(81);
let answer = null; // 81 characters, once there is one
let running = null;
const cells = [];

// ---- puzzles as text -------------------------------------------------------------------------------------------

/** 81 digits, 0 for a blank; throws what is wrong. */
export function parse(text) {
  const found = text.replace(/[\s|+\-_]/g, (character) => (character === "_" ? "0" : "")).replace(/[.*]/g, "0");
  const strange = [...found].find((character) => !/[0-9]/.test(character));
  if (strange) throw new Error(`“${strange}” is no cell; give 1–9 for a clue and 0 or . for a blank.`);
  if (found.length !== 81) throw new Error(`${found.length} cells so far; a puzzle has 81.`);
  return found;
}

const cluesOf = (text) => [...text].filter((clue) => clue !== "0").length;

const shuffled = (items) => {
  const found = [...items];
  for (let at = found.length - 1; at > 0; at--) {
    const other = Math.floor(Math.random() * (at + 1));
    [found[at], found[other]] = [found[other], found[at]];
  }
  return found;
};

/** A puzzle as new as it looks: a built-in one with digits renamed, lines and bands permuted, perhaps transposed. */
function random() {
  const [seed] = shuffled(SAMPLES);
  const lines = () => shuffled([0, 1, 2]).flatMap((band) => shuffled([0, 1, 2]).map((line) => 3 * band + line));
  const [rows, columns, digits, isTurned] = [lines(), lines(), ["0", ...shuffled("123456789")], Math.random() < 0.5];
  return rows.flatMap((row) => columns.map((column) => digits[seed[isTurned ? 9 * column + row : 9 * row + column]])).join("");
}

/** Units in which a digit stands twice: [{name, number, digit, cells}]. */
function conflicts(board) {
  return UNITS.flatMap(({ name, number, cells: unit }) => [..."123456789"].flatMap((digit) => {
    const found = unit.filter((cell) => board[cell] === digit);
    return found.length > 1 ? [{ name, number, digit, cells: found }] : [];
  }));
}

// ---- solving ---------------------------------------------------------------------------------------------------

function template() {
  return (puzzle.match(/0|[1-9]+/g) ?? []).reduce(({ pieces, at }, piece) => ({
    pieces: [...pieces, piece === "0" ? { name: `c${at}`, length: 1 } : piece],
    at: at + piece.length,
  }), { pieces: [], at: 0 }).pieces;
}

/** One [character, entropy] a cell; a control token is a blank. */
function cellsOf(frame) {
  return frame.pieces.flatMap((piece, at) => [...(piece || " ")].map((character) => [character, frame.entropies[at]])).slice(0, 81);
}

async function solve() {
  if (running) return;
  byId("sudoku-trouble").replaceChildren();
  const wrong = conflicts(puzzle)[0];
  if (wrong) return judge(`Digit ${wrong.digit} stands twice in ${wrong.name} ${wrong.number}; correct the clues.`, "bad");
  if (!puzzle.includes("0")) return judge("There is no blank to fill.", "bad");
  answer = null;
  draw();
  const control = new AbortController();
  running = control;
  showButtons();
  judge("Solving…", "");
  const gauge = new Gauge((frame) => (frame ? drawFrame(frame) : draw()));
  byId("sudoku-gauge").replaceChildren(gauge.root);
  try {
    const messages = [{ role: "user", content: `Solve this Sudoku:\n${puzzle}` }];
    const body = { ...settings.request({ isTemplate: true }), messages, template: template() };
    let result = null;
    for await (const found of stream("v1/fill", body, control.signal)) {
      if (found.draft) gauge.add(found.draft);
      else result = found;
    }
    if (!result) throw new ApiError("broken", "The answer held no board.");
    answer = [...result.text].slice(0, 81).join("").padEnd(81, " ");
    running = null;
    gauge.finish(result.usage);
    draw();
    verdict(result.usage);
  } catch (error) {
    running = null;
    gauge.finish();
    draw();
    judge(error.name === "AbortError" ? "Stopped." : "", "");
    if (error.name !== "AbortError") byId("sudoku-trouble").replaceChildren(trouble(error, solve));
  }
  document.dispatchEvent(new Event("sfumato:look"));
  return showButtons();
}

function verdict(usage) {
  const wrong = conflicts(answer);
  const empty = [...answer].filter((cell) => !/[1-9]/.test(cell)).length;
  const took = usage ? ` in ${usage.steps} ${usage.steps === 1 ? "step" : "steps"}, ${usage.seconds.toFixed(2)} s` : "";
  const isKept = [...puzzle].every((clue, cell) => clue === "0" || clue === answer[cell]);
  if (!wrong.length && !empty && isKept) return judge(`Solved${took}. Every row, column and box holds.`, "good");
  const first = wrong[0];
  let reason = "a clue was changed";
  if (isKept) reason = empty ? `${empty} cells hold no digit` : `digit ${first.digit} stands twice in ${first.name} ${first.number}`;
  return judge(`Not solved${took}: ${reason}.`, "bad");
}

function judge(words, kind) {
  byId("verdict").textContent = words;
  byId("verdict").dataset.kind = kind;
}

// ---- the board -------------------------------------------------------------------------------------------------

function look(cell, text, name) {
  const field = cells[cell];
  if (field.value !== text) field.value = text;
  if (field.className !== name) field.className = name;
}

function draw() {
  const board = answer ?? puzzle;
  const wrong = new Set(conflicts(board).flatMap((conflict) => conflict.cells));
  for (let cell = 0; cell < 81; cell++) {
    const isClue = puzzle[cell] !== "0";
    const text = isClue ? puzzle[cell] : (answer?.[cell] ?? "").trim();
    look(cell, text, `${isClue ? "clue" : "l0"}${wrong.has(cell) ? " conflict" : ""}`);
  }
}

function drawFrame(frame) {
  const found = cellsOf(frame);
  for (let cell = 0; cell < 81; cell++) {
    if (puzzle[cell] !== "0") look(cell, puzzle[cell], "clue");
    else if (found[cell]) look(cell, /[1-9]/.test(found[cell][0]) ? found[cell][0] : "·", `l${level(found[cell][1])}`);
  }
}

function set(found, isTyped = false) {
  running?.abort();
  puzzle = found;
  answer = null;
  save("sudoku", puzzle);
  byId("sudoku-gauge").replaceChildren();
  byId("sudoku-trouble").replaceChildren();
  if (!isTyped) byId("puzzle-text").value = puzzle.match(/.{27}/g).join("\n").replaceAll("0", ".");
  byId("puzzle-note").textContent = `${cluesOf(puzzle)} clues.`;
  byId("sample").value = SAMPLES.includes(puzzle) ? SAMPLES.indexOf(puzzle) : "";
  judge("", "");
  draw();
  showButtons();
}

function read(text, isTyped) {
  try {
    set(parse(text), isTyped);
  } catch (error) {
    byId("puzzle-note").textContent = error.message;
  }
}

function showButtons() {
  const [shown, gone] = running ? [byId("sudoku-stop"), byId("solve")] : [byId("solve"), byId("sudoku-stop")];
  const hasFocus = document.activeElement === gone;
  shown.hidden = false;
  gone.hidden = true;
  if (hasFocus) shown.focus();
  byId("clear-answer").disabled = !answer;
  for (const field of cells) field.readOnly = Boolean(running);
}

function put(cell, digit) {
  if (running) return;
  set(puzzle.slice(0, cell) + digit + puzzle.slice(cell + 1));
}

function move(from, to) {
  cells[from].tabIndex = -1;
  cells[to].tabIndex = 0;
  cells[to].focus();
  cells[to].select();
}

function onKey(event, cell) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const column = cell % 9;
  const steps = {
    ArrowLeft: column > 0 && -1,
    ArrowRight: column < 8 && 1,
    ArrowUp: cell > 8 && -9,
    ArrowDown: cell < 72 && 9,
    Home: -column,
    End: 8 - column,
  };
  if (event.key in steps) move(cell, cell + Number(steps[event.key]));
  else if (/^[1-9]$/.test(event.key)) put(cell, event.key);
  else if (["0", ".", " ", "Backspace", "Delete"].includes(event.key)) put(cell, "0");
  else if (event.key === "Enter") solve();
  else return;
  event.preventDefault();
}

function build() {
  for (let row = 0; row < 9; row++) {
    const line = el("div", { role: "row", class: "line" });
    for (let column = 0; column < 9; column++) {
      const cell = 9 * row + column;
      const label = `Row ${row + 1}, column ${column + 1}`;
      const field = el("input", { inputmode: "numeric", autocomplete: "off", maxlength: 1, tabindex: cell ? -1 : 0, "aria-label": label });
      field.addEventListener("keydown", (event) => onKey(event, cell));
      // A phone's keyboard sends no key names.
      field.addEventListener("input", () => put(cell, /[1-9]/.test(field.value) ? field.value : "0"));
      field.addEventListener("focus", () => {
        for (const other of cells) other.tabIndex = -1;
        field.tabIndex = 0;
      });
      cells.push(field);
      line.append(el("div", { role: "gridcell" }, field));
    }
    byId("board").append(line);
  }
  byId("board").addEventListener("paste", (event) => {
    event.preventDefault();
    read(event.clipboardData.getData("text"), false);
  });
}

export function start() {
  build();
  const choice = byId("sample");
  choice.append(el("option", { value: "" }, "choose"), ...SAMPLES.map((sample, at) => el("option", { value: at }, `${cluesOf(sample)} clues`)));
  choice.addEventListener("change", () => choice.value && set(SAMPLES[Number(choice.value)]));
  byId("random").addEventListener("click", () => set(random()));
  byId("clear-board").addEventListener("click", () => set("0".repeat(81)));
  byId("clear-answer").addEventListener("click", () => set(puzzle));
  byId("solve").addEventListener("click", solve);
  byId("sudoku-stop").addEventListener("click", () => running?.abort());
  byId("sudoku").addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) {
      running.abort();
      announce("Stopped.");
    }
  });
  byId("puzzle-text").addEventListener("input", () => read(byId("puzzle-text").value, true));
  let kept = SAMPLES[0];
  try {
    kept = parse(load("sudoku", kept));
  } catch {
    // What was kept is no puzzle.
  }
  set(kept);
}

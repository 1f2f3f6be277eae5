// A question as it is built by hand: its fields, and the bars of its answer below them.

import { Bars } from "./bars.js";
import { el } from "./dom.js";
import { KINDS, UNITS, above, answersOf } from "./questions.js";

const FOLDED = 8; // rows; more are folded until they are looked at

/** `acts`: {change(), remove(card), all(), show(passage)}. */
export class Card {
  constructor(question, acts) {
    Object.assign(this, { question, acts, key: null, refusal: null, reading: null, problem: "" });
    this.bars = new Bars(acts.show);
    this.id = el("input", { class: "id", value: question.id, spellcheck: "false", autocomplete: "off", "aria-label": "Id of the question", placeholder: "id", oninput: () => this.set("id", this.id.value) });
    this.kind = el("select", { "aria-label": "Kind of the question", onchange: () => this.setKind() }, ...Object.entries(KINDS).map(([kind, name]) => el("option", { value: kind }, name)));
    this.kind.value = question.kind;
    this.away = el("button", { class: "quiet", type: "button", onclick: () => acts.remove(this) }, "×");
    this.instructions = this.area("Instructions", "instructions", "What is asked");
    this.parts = el("div", { class: "parts" });
    this.wrong = el("p", { class: "wrong", hidden: true });
    this.lack = el("p", { class: "hint", hidden: true });
    this.root = el("article", { class: "question" }, el("div", { class: "head" }, this.id, this.kind, this.away), this.instructions, this.parts, this.wrong, this.lack, this.bars.root);
    this.root.addEventListener("change", () => acts.settle(this));
    this.draw();
  }

  area(name, field, placeholder) {
    return el("textarea", { rows: 1, dir: "auto", "aria-label": name, placeholder, value: this.question[field], oninput: (event) => this.set(field, event.target.value) });
  }

  set(field, value) {
    this.question[field] = value;
    this.name();
    this.acts.change();
  }

  setKind() {
    this.question.kind = this.kind.value;
    Object.assign(this, { key: null, reading: null });
    this.bars.clear();
    this.draw();
    this.acts.change();
  }

  name() {
    const { id } = this.question;
    this.root.setAttribute("aria-label", `Question ${id}`);
    this.away.setAttribute("aria-label", `Remove the question ${id}`);
  }

  /** The fields that its kind has. */
  draw() {
    const { question } = this;
    this.name();
    const isRows = question.kind === "choice" || question.kind === "score";
    const rows = isRows ? this.rowsBox() : null;
    const described = question.kind !== "noul" ? null : this.fold("What yes and no mean", Boolean(question.yes || question.no),
      this.area("What yes means", "yes", "What yes means"), this.area("What no means", "no", "What no means"));
    const unit = el("select", { "aria-label": "What is quoted", onchange: () => this.set("unit", unit.value) }, ...UNITS.map((name) => el("option", { value: name }, `one ${name}`)));
    unit.value = question.unit;
    this.condition = el("div", { class: "row condition" });
    const condition = this.fold("Asked only if", Boolean(question.parent), this.condition);
    condition.addEventListener("toggle", () => this.drawCondition());
    this.parts.replaceChildren(...[rows, described, question.kind === "x_span" ? unit : null, condition].filter(Boolean));
    this.drawCondition();
  }

  fold(name, isOpen, ...children) {
    return el("details", { open: isOpen }, el("summary", {}, name), ...children);
  }

  // ---- options and levels ----------------------------------------------------------------------------------------

  rowsBox() {
    const isChoice = this.question.kind === "choice";
    const rows = isChoice ? this.question.options : this.question.levels;
    this.rows = el("div", { class: "rows" });
    const add = el("button", { class: "quiet", type: "button", onclick: () => this.add(rows.length) }, isChoice ? "Add an option" : "Add a level");
    this.summary = el("summary");
    const box = el("details", { open: rows.length <= FOLDED }, this.summary, this.rows, add);
    this.drawRows();
    return box;
  }

  drawRows() {
    const isChoice = this.question.kind === "choice";
    const rows = isChoice ? this.question.options : this.question.levels;
    this.summary.textContent = `${rows.length} ${isChoice ? "options" : "levels, the lowest first"}`;
    this.rows.replaceChildren(...rows.map((row, at) => (isChoice ? this.optionRow(row, at) : this.levelRow(row, at))));
  }

  row(at, number, ...fields) {
    const what = this.question.kind === "choice" ? "option" : "level";
    const remove = el("button", { class: "quiet small", type: "button", "aria-label": `Remove the ${what} ${at + 1}`, onclick: () => this.removeRow(at) }, "×");
    const onkeydown = (event) => {
      if (event.key !== "Enter" || event.isComposing || event.ctrlKey || event.metaKey || event.target.tagName !== "INPUT") return;
      event.preventDefault();
      this.add(at + 1);
    };
    const onpaste = (event) => this.paste(event, at);
    return el("div", { class: "option", onkeydown, onpaste }, number, ...fields, remove);
  }

  optionRow(option, at) {
    const field = (name, label, placeholder) => el("input", { value: option[name], dir: "auto", autocomplete: "off", "aria-label": `${label} ${at + 1}`, placeholder, oninput: (event) => {
      option[name] = event.target.value;
      this.acts.change();
    } });
    return this.row(at, null, field("name", "Option", "name"), field("text", "Meaning of option", "what it means"));
  }

  levelRow(level, at) {
    const field = el("input", { value: level, dir: "auto", autocomplete: "off", "aria-label": `Level ${at}`, placeholder: at ? "" : "the lowest", oninput: () => {
      this.question.levels[at] = field.value;
      this.acts.change();
    } });
    return this.row(at, el("span", { class: "number", "aria-hidden": "true" }, String(at)), field);
  }

  add(at, rows = [""]) {
    const isChoice = this.question.kind === "choice";
    if (isChoice) this.question.options.splice(at, 0, ...rows.map((row) => {
      const [, name, text] = row.match(/^([^\t:]*)(?:[\t:]\s*(.*))?$/);
      return { name: name.trim(), text: text ?? "" };
    }));
    else this.question.levels.splice(at, 0, ...rows);
    this.drawRows();
    this.rows.children[at + rows.length - 1]?.querySelector("input").focus();
    this.acts.change();
  }

  removeRow(at) {
    (this.question.kind === "choice" ? this.question.options : this.question.levels).splice(at, 1);
    this.drawRows();
    (this.rows.children[Math.min(at, this.rows.children.length - 1)]?.querySelector("input") ?? this.instructions).focus();
    this.acts.change();
  }

  /** Many lines are many rows, in place of those that are empty. */
  paste(event, at) {
    const lines = event.clipboardData.getData("text").split(/\r?\n/).map((line) => line.trim()).filter(Boolean);
    if (lines.length < 2) return;
    event.preventDefault();
    const name = this.question.kind === "choice" ? "options" : "levels";
    const isFilled = (row) => (typeof row === "string" ? row : row.name || row.text);
    const rows = this.question[name];
    const before = rows.slice(0, at + 1).filter(isFilled);
    rows.splice(0, rows.length, ...before, ...rows.slice(at + 1).filter(isFilled));
    this.add(before.length, lines);
  }

  // ---- what it depends on ------------------------------------------------------------------------------------------

  drawCondition() {
    const { question } = this;
    const all = this.acts.all();
    const others = all.filter((one) => one !== question && one.kind !== "x_span" && !above(one, all).includes(question));
    const parent = el("select", { "aria-label": "Question it depends on", onchange: () => {
      question.parent = parent.value;
      question.holds = answersOf(others.find(({ key }) => key === parent.value) ?? { kind: "" })[0]?.[0] ?? "";
      this.drawCondition();
      this.condition.querySelector("select").focus();
      this.acts.change();
    } }, el("option", { value: "" }, "always"), ...others.map(({ key, id }) => el("option", { value: key }, id)));
    parent.value = others.some(({ key }) => key === question.parent) ? question.parent : "";
    const condition = others.find(({ key }) => key === parent.value);
    const holds = condition && el("select", { "aria-label": "Answer it must have", onchange: () => this.set("holds", holds.value) }, ...answersOf(condition).map(([value, name]) => el("option", { value }, name)));
    if (holds) holds.value = question.holds;
    this.condition.replaceChildren(parent, ...(holds ? [" is ", holds] : []));
  }

  // ---- what the server says of it ------------------------------------------------------------------------------------

  /** What it lacks before it can be asked; "" for nothing. */
  showLack(words) {
    this.lack.textContent = words;
    this.lack.hidden = !words;
  }

  /** A refusal with the place in the record that it names, such as ["criteria", "Billing"]; none without words. */
  refuse(words, place = []) {
    for (const field of this.root.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
    this.wrong.textContent = words;
    this.wrong.hidden = !words;
    if (!words) return;
    const inner = place[0] === this.question.kind ? place.slice(1) : place;
    const at = inner[0] === "criteria" && this.rows ? [...this.rows.children].findIndex((_, row) => String(inner[1]) === (this.question.options[row]?.name ?? "") || inner[1] === row) : -1;
    const field = { criteria: this.rows?.children[at]?.querySelector("input"), type: this.kind }[inner[0]];
    (field ?? this.instructions).setAttribute("aria-invalid", "true");
  }
}

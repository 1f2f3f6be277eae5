// Options in plain words: what a person calls each, and a sentence where the server's own speaks to those who know.

/** name: [what it is called, what it does]. */
export const WORDS = {
  max_tokens: ["Longest answer, in tokens", "A token is about three quarters of a word. Empty: as long as there is room."],
  min_tokens: ["Shortest answer, in tokens", ""],
  stop: ["Stop at these words", "The answer ends where one of them would stand."],
  seed: ["Seed", "The same number gives the same answer again. Empty: another answer each time."],
  mode: ["Way of writing", "Whole canvases that clear, or one token after the other."],
  max_steps: ["Most steps for a canvas", "More steps: slower, often better."],
  t_max: ["Temperature at the first step", "Higher: bolder choices."],
  t_min: ["Temperature at the last step", "Lower: the draft settles on what is likeliest."],
  temperature_steps: ["Steps from first to last temperature", ""],
  entropy_bound: ["Boldness of a step", "How much doubt a step may accept at once. Higher: faster, less careful."],
  stability: ["Steps without change before the end", "So many drafts must be alike before a canvas is taken."],
  confidence: ["Certainty before the end", "The doubt under which a settled canvas is taken. 0: use all steps."],
  repeats: ["Stop what only repeats itself", "A canvas ends once its draft has stood at so many of the last 16 steps. 0: off."],
  temperature: ["Temperature", "Higher: more varied. 0, one token after the other: always the likeliest."],
  adapter: ["Adapter", "Its name, as the server has it. Empty: the model itself."],
  top_k: ["Choose among so many of the likeliest", "0: among all."],
  top_p: ["Choose among this share of likelihood", "1: among all."],
  min_p: ["Choose among those nearly as likely as the best", "0.1: at least a tenth as likely. 0: among all."],
  presence_penalty: ["Avoid words that the answer has", "Above 0: fewer repeats, below 0: more."],
  frequency_penalty: ["Avoid words the more often the answer has them", "Above 0: fewer repeats, below 0: more."],
  repetition_penalty: ["Avoid words of the question and the answer", "Above 1: fewer repeats. 1: off."],
  logit_bias: ["Favour or forbid tokens, by their numbers", 'As JSON, from -100, never, to 100, always: {"5": -100}'],
  logprobs: ["Report the likelihood of each token", ""],
  top_logprobs: ["Report so many other tokens", ""],
  early: ["Show the beginning as soon as it has settled", ""],
  redos: ["Begin an unsure canvas again", "So many times at most, from other noise. 0: never."],
  verify: ["Read what was written, and begin again where it surprises", "Nats of surprise: 4, say. Needs the option above or below."],
  finish: ["Where it still surprises, write on word by word", "Needs the option above."],
  short: ["Short canvas for short answers", "Much faster; the model sees less at once than it was trained with."],
  schema: ["The answer follows a JSON Schema", ""],
  regex: ["The answer matches a pattern", ""],
  grammar: ["The answer follows a grammar", ""],
  choices: ["The answer is one of", "One possible answer a line."],
  strict: ["Calls of tools follow their schemas", ""],
  must_call: ["The answer is a call of a tool", ""],
  thinking: ["Think before answering", "Better on hard questions, slower on all."],
};

/** Options that say what an answer may be, rather than how it is found. */
export const LIMITING = ["max_tokens", "min_tokens", "stop", "seed", "schema", "regex", "grammar", "choices", "strict", "must_call"];

export const nameOf = (option) => WORDS[option]?.[0] ?? option.replaceAll("_", " ");

// Node's clients of OpenAI's routes: node openai.mjs URL KEY writes what each call came to, as JSON: name -> result.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false;
const [baseURL, apiKey] = process.argv.slice(2);
const results = {};

async function record(name, call) {
  try {
    results[name] = await call();
  } catch (error) {
    results[name] = `${error}: ${error.responseBody ?? ""}`;
  }
}

// --- the AI SDK: its own routes, and those of servers that are compatible ---

const openai = createOpenAI({ baseURL, apiKey });
const compatible = createOpenAICompatible({ name: "sfumato", baseURL, apiKey, supportsStructuredOutputs: true });
const weather = tool({
  description: "The weather in a place",
  inputSchema: z.object({ place: z.string() }),
  execute: async () => "rain",
});
const schema = z.object({ n: z.number().int(), is_good: z.boolean() });
const models = { chat: openai.chat("fake"), responses: openai.responses("fake"), compatible: compatible("fake") };
const thinking = { reasoningEffort: "high", reasoningSummary: "auto", forceReasoning: true, textVerbosity: "low" };

for (const [name, model] of Object.entries(models)) {
  const fields = { model, prompt: "Hi", maxRetries: 0, seed: 1 };
  const agent = { ...fields, tools: { weather }, stopWhen: stepCountIs(3) };
  const think = { providerOptions: { sfumato: { reasoningEffort: "high" }, openai: { ...thinking, store: false } } };
  await record(`${name}: tools`, async () => (await generateText(agent)).text);
  await record(`${name}: stream of tools and thoughts`, async () => {
    const run = streamText({ ...agent, ...think });
    const kinds = new Set();
    for await (const part of run.fullStream) kinds.add(part.type);
    return { text: await run.text, thought: (await run.reasoningText) ?? null, kinds: [...kinds] };
  });
  await record(`${name}: object`, async () => (await generateObject({ ...fields, schema })).object);
  await record(`${name}: stream of an object`, async () => {
    const run = streamObject({ ...fields, schema });
    for await (const _ of run.partialObjectStream);
    return await run.object;
  });
  await record(`${name}: object behind a tool`, async () =>
    (await generateText({ ...agent, output: Output.object({ schema }) })).output);
  await record(`${name}: preset`, async () =>
    (await generateText({ ...fields, temperature: 0.7, topP: 0.9, presencePenalty: 0.5, frequencyPenalty: 0.5 })).text);
}

// --- OpenAI's own ---

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const said = { model: "fake", messages: [{ role: "user", content: "Hi" }], seed: 1 };

await record("openai: stream", async () => {
  const stream = client.chat.completions.stream({ ...said, stream_options: { include_usage: true } });
  return (await stream.finalChatCompletion()).choices[0].message.content;
});
await record("openai: runTools", async () => {
  const parameters = { type: "object", properties: { place: { type: "string" } } };
  const tool = { name: "weather", parse: JSON.parse, parameters, function: async () => "rain" };
  return await client.chat.completions.runTools({ ...said, tools: [{ type: "function", function: tool }] }).finalContent();
});
await record("openai: responses", async () => {
  const fields = { reasoning: { effort: "high", summary: "auto" }, include: ["reasoning.encrypted_content"] };
  const first = await client.responses.stream({ model: "fake", input: "Hi", ...fields }).finalResponse();
  const again = await client.responses.create({ model: "fake", input: "More", previous_response_id: first.id });
  const kept = await client.responses.retrieve(again.id);
  const items = await client.responses.inputItems.list(again.id);
  await client.responses.delete(again.id);
  return { thought: first.output[0].summary[0].text, isKept: kept.id === again.id, input: items.data[0].content };
});

console.log(JSON.stringify(results));

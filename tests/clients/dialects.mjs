// Node's clients of Anthropic's and Ollama's routes: node dialects.mjs URL KEY writes name -> result, as JSON.

import { createAnthropic } from "@ai-sdk/anthropic";
import Anthropic from "@anthropic-ai/sdk";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { Ollama } from "ollama";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false;
const [url, apiKey] = process.argv.slice(2);
const results = {};

async function record(name, call) {
  try {
    results[name] = await call();
  } catch (error) {
    results[name] = `${error}: ${error.responseBody ?? ""}`;
  }
}

const parameters = { type: "object", properties: { place: { type: "string" } }, required: ["place"] };
const messages = [{ role: "user", content: "Hi" }];
const model = "fake";

// --- Anthropic's SDK ---

const client = new Anthropic({ baseURL: url, apiKey, maxRetries: 0 });
const tools = [{ name: "weather", description: "d", input_schema: parameters }];
const thinking = { type: "enabled", budget_tokens: 1024 };

await record("anthropic: loop", async () => {
  const fields = { model, max_tokens: 100, tools, thinking };
  const stream = client.messages.stream({ ...fields, messages });
  const first = await stream.finalMessage();
  const call = first.content.at(-1);
  const turn = { role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "rain" }] };
  const turns = [...messages, { role: "assistant", content: first.content }, turn];
  const last = await client.messages.create({ ...fields, messages: turns });
  return { kinds: first.content.map((block) => block.type), input: call.input, text: last.content.at(-1).text };
});
await record("anthropic: count", async () => (await client.messages.countTokens({ model, messages })).input_tokens > 0);
await record("anthropic: error", () =>
  client.messages.create({ model: "other", max_tokens: 1, messages }).catch((error) => `${error.status} ${error.requestID}`),
);

// --- the AI SDK ---

const provider = createAnthropic({ baseURL: `${url}/v1`, apiKey });
const weather = tool({ description: "d", inputSchema: z.object({ place: z.string() }), execute: async () => "rain" });
const shared = { model: provider(model), maxRetries: 0, prompt: "Hi" };

await record("ai: tools", async () => {
  return (await generateText({ ...shared, tools: { weather }, stopWhen: stepCountIs(3) })).text;
});
await record("ai: stream", async () => {
  const result = streamText({ ...shared, providerOptions: { anthropic: { thinking: { type: "enabled", budgetTokens: 1024 } } } });
  return { text: await result.text, thought: await result.reasoningText };
});
await record("ai: object", async () => {
  return (await generateObject({ ...shared, schema: z.object({ n: z.number().int(), is_good: z.boolean() }) })).object;
});

// --- Ollama's ---

const ollama = new Ollama({ host: url, headers: { authorization: `Bearer ${apiKey}` } });

await record("ollama: loop", async () => {
  const declared = [{ type: "function", function: { name: "weather", description: "d", parameters } }];
  const { message } = await ollama.chat({ model, messages, tools: declared });
  const result = { role: "tool", tool_name: message.tool_calls[0].function.name, content: "rain" };
  return (await ollama.chat({ model, messages: [...messages, message, result], tools: declared })).message.content;
});
await record("ollama: stream", async () => {
  let text = "", thought = "", reason = "";
  for await (const part of await ollama.chat({ model, messages, stream: true, think: true, options: { seed: 1 } })) {
    text += part.message.content;
    thought += part.message.thinking ?? "";
    reason = part.done_reason;
  }
  return { text, thought, reason };
});
await record("ollama: infill", async () => (await ollama.generate({ model, prompt: "a", suffix: "b" })).response);
await record("ollama: models", async () => (await ollama.list()).models.map((one) => one.name));

console.log(JSON.stringify(results));

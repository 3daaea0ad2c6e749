// The server's API: which model it has, and streams of answers.

import { loadToken, saveToken } from "./store.js";

let token = loadToken();

export function setToken(value) {
  token = value;
  saveToken(value);
}

/** An error that the server has answered with. */
export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  const sent = token;
  if (sent) headers.Authorization = `Bearer ${sent.replace(/[^ -~]/g, "?")}`; // headers are ASCII
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it running?", 0, "unreachable");
  }
  if (response.ok) return response;
  if (response.status === 401 && sent !== token) return request(path, options); // the user has given another key since
  const error = (await response.json().catch(() => null))?.error;
  throw new ApiError(error?.message ?? response.statusText, response.status, error?.code);
}

export async function model() {
  const { data } = await (await request("v1/models")).json();
  return data[0];
}

/** Events of a chat completion: objects with parts (each of a type and a text) and a finish reason. */
export async function* answer(body, signal) {
  const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true }; // the server has gone
    });
    if (done) throw new ApiError("The connection was lost before the answer was complete.", 0, "unreachable");
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, 0, chunk.error.code);
      const { delta, finish_reason: reason } = chunk.choices[0];
      const parts = delta.parts ?? (delta.content ? [{ type: "text", text: delta.content }] : []);
      yield { parts, reason };
    }
  }
}

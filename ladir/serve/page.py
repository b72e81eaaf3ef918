"""The page at /: asks a question and shows thoughts forming.  It needs nothing beside itself."""

from __future__ import annotations

import base64
import hashlib

_STYLE = """
body { margin: 0 auto; max-width: 50rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; }
textarea { width: 100%; box-sizing: border-box; font: inherit; min-height: 5rem; }
label { margin-right: 1rem; white-space: nowrap; } input { font: inherit; width: 5rem; } #key { width: 12rem; }
button { font: inherit; padding: .2rem 1rem; }
.trajectory { margin: 1rem 0; padding: .6rem .8rem; border: 1px solid #ddd; border-radius: .3rem; }
.thought { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.forming { color: #777; } .answer { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
#error { color: #a02020; white-space: pre-wrap; }
"""

_SCRIPT = """
const by = (id) => document.getElementById(id);
let stop = null;

function box(boxes, index) {
  if (!boxes[index]) {
    const outer = document.createElement("div");
    outer.className = "trajectory";
    by("out").append(outer);
    boxes[index] = {outer, blocks: [], finished: 0};
  }
  return boxes[index];
}

function line(box, block) {
  if (!box.blocks[block]) {
    const text = document.createElement("div");
    text.className = "thought forming";
    box.outer.append(text);
    box.blocks[block] = text;
  }
  return box.blocks[block];
}

function answer(box) {
  if (!box.answer) {
    box.blocks.slice(box.finished).forEach((text) => text.remove());
    box.answer = document.createElement("div");
    box.answer.className = "answer";
    box.answer.textContent = "answer: ";
    box.outer.append(box.answer);
  }
  return box.answer;
}

function show(boxes, choice) {
  const own = box(boxes, choice.index), delta = choice.delta || {};
  if (choice.step) line(own, choice.step.block).textContent = choice.step.text;
  if (delta.reasoning_content) {
    const text = line(own, own.finished++);
    text.textContent = delta.reasoning_content.trimEnd();
    text.className = "thought";
  }
  if (delta.content || choice.finish_reason) answer(own).textContent += delta.content || "";
  if (choice.finish_reason && choice.score !== undefined) own.answer.textContent += "  (score " + choice.score.toFixed(2) + ")";
}

async function ask() {
  by("out").replaceChildren();
  by("error").textContent = "";
  stop = new AbortController();
  const headers = {"Content-Type": "application/json"};
  if (by("key").value) headers.Authorization = "Bearer " + by("key").value;
  const body = {messages: [{role: "user", content: by("question").value}], n: Number(by("n").value), stream: true,
                stream_steps: true};
  if (by("seed").value) body.seed = Number(by("seed").value);
  if (by("steps").value) body.num_steps = Number(by("steps").value);
  const reply = await fetch("v1/chat/completions", {method: "POST", headers, body: JSON.stringify(body), signal: stop.signal});
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader(), boxes = [];
  for (let rest = "";;) {
    const {done, value} = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\\n\\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      const piece = JSON.parse(part.slice(6));
      if (piece.error) throw new Error(piece.error.message);
      piece.choices.forEach((choice) => show(boxes, choice));
    }
  }
}

by("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  by("ask").disabled = true;
  try { await ask(); } catch (error) { if (error.name !== "AbortError") by("error").textContent = error.message; }
  by("ask").disabled = false;
});
by("stop").addEventListener("click", () => stop && stop.abort());
"""

_BODY = """
<h1>LaDiR</h1>
<form id="form">
<p><textarea id="question" aria-label="question" placeholder="a question" required></textarea></p>
<p><label>trajectories <input id="n" type="number" min="1" value="3"></label>
<label>steps <input id="steps" type="number" min="1"></label>
<label>seed <input id="seed" type="number"></label>
<label>key <input id="key" type="password" autocomplete="off"></label></p>
<p><button id="ask">ask</button> <button id="stop" type="button">stop</button></p>
</form>
<div id="error" role="alert"></div>
<div id="out" aria-live="polite"></div>
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


#: allows the page's own script and style, and requests to the server that it came from
POLICY = f"default-src 'none'; connect-src 'self'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)}; img-src data:"

PAGE = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
    f"<title>LaDiR</title>\n<style>{_STYLE}</style>\n</head>\n<body>{_BODY}<script>{_SCRIPT}</script>\n</body>\n</html>\n"
)

"use strict";

/* Text that a model wrote is put into the page as text alone (textContent, dataset), never as HTML. */

const $ = (id) => document.getElementById(id);
const MARKS = { " ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥" };
const BETA_WAIT = 250; // ms that the slider must rest: each press of an arrow key is a change

let key = ""; // of the API; kept in this page and nowhere else
let model; // what /v1/models says of it
let columns = [];
let asked; // the settings of the texts that are shown, but for beta

/* As `trace.visible` in Python: invisible characters made visible. */
function visible(token) {
  const named = (c) => `<U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`;
  const mark = (c) => MARKS[c] ?? (/[\p{C}\p{Z}]/u.test(c) ? named(c) : c);
  const shown = [...token].map(mark).join("");
  return /^\p{M}/u.test(shown) ? `◌${shown}` : shown || "<empty>";
}

function signed(nats) {
  const shown = Number(nats.toFixed(2));
  return `${shown < 0 ? "−" : "+"}${Math.abs(shown).toFixed(2)} nats`;
}

function element(tag, text, className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

// The server ----------------------------------------------------------------------------------------------------------

async function fetched(path, body, signal) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const how = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const answer = await fetch(path, { headers, signal, ...how });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  if (answer.status === 401) {
    $("unlock").hidden = false;
    throw Error(key ? "The server refuses this API key." : "The server wants an API key.");
  }
  throw Error(said.error?.message ?? `The server answered ${answer.status}.`);
}

/* The JSON of server-sent events, until [DONE]. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let unread = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) throw Error("The answer broke off.");
    const parts = (unread + value).split("\n\n");
    unread = parts.pop(); // not whole yet
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// A text and its candidates -------------------------------------------------------------------------------------------

class Column {
  constructor(method) {
    this.method = method;
    this.article = document.querySelector("template").content.cloneNode(true).firstElementChild;
    [this.title, this.text, this.end, this.panel] = this.article.children;
    const name = method === "plain" ? "plain" : "guided";
    this.title.append(`${name} `, (this.about = element("span", method === "plain" ? "" : `(${method})`)));
    this.article.className = name;
    this.text.setAttribute("aria-label", `tokens of the ${name} text`);
    this.text.addEventListener("click", ({ target }) => this.open(target));
    this.text.addEventListener("keydown", (event) => this.press(event));
    this.records = new Map(); // of each token, by its element
    $("texts").append(this.article);
  }

  /* Writes a text, in place of the one before. */
  async write(settings) {
    this.stop?.abort();
    const stop = (this.stop = new AbortController());
    const guide = this.method === "plain" ? {} : { beta: Number($("beta").value) };
    const path = model.pargs.chat ? "v1/chat/completions" : "v1/completions";
    this.clear();
    if (guide.beta !== undefined) this.about.textContent = `(${this.method}, beta ${guide.beta})`;
    try {
      const body = { ...settings, ...guide, model: model.id, method: this.method, stream: true };
      for await (const event of events(await fetched(path, body, stop.signal))) {
        stop.signal.throwIfAborted();
        if (event.error) throw Error(event.error.message);
        this.add(event.choices[0]);
      }
      this.state = "done";
    } catch (wrong) {
      if (stop !== this.stop) return; // another text is being written here
      [this.state, this.wrong] = stop.signal.aborted ? ["stopped", ""] : ["failed", wrong.message];
    }
    const rest = this.said.slice(this.spelt); // a last character that was never completed belongs to no token
    if (rest) this.text.append(rest);
    this.sum();
    report();
  }

  clear() {
    Object.assign(this, { state: "writing", wrong: "", said: "", spelt: 0, finish: null });
    this.records.clear();
    this.text.replaceChildren();
    this.panel.hidden = true;
    this.sum();
    report();
  }

  add({ text, delta, logprobs, finish_reason }) {
    const texts = logprobs.tokens ?? logprobs.content.map(({ token }) => token);
    this.said += text ?? delta.content;
    this.finish = finish_reason;
    logprobs.guidance.forEach((record, i) => this.append(texts[i], record));
    this.sum();
  }

  append(text, record) {
    const token = element("span", text, way(record.nats));
    const drawn = record.candidates.find((one) => one.drawn);
    // blanks, halves of a character and the end have nothing to be clicked
    if (!/[^\p{C}\p{Z}]/u.test(text)) token.dataset.mark = visible(text || drawn.token);
    if (this.method !== "plain") token.title = `${signed(record.nats)} by guidance`;
    token.setAttribute("role", "button");
    token.setAttribute("aria-pressed", "false");
    token.tabIndex = this.records.size ? -1 : 0; // Tab leads to one token of a text; arrow keys to the others
    this.spelt += text.length;
    this.records.set(token, record);
    this.text.append(token);
  }

  sum() {
    const moved = [...this.records.values()].reduce((total, { nats }) => total + nats, 0);
    const why = { stop: "finished", length: "cut at the length limit" }[this.finish] ?? this.state;
    const count = this.records.size;
    const nats = this.method === "plain" ? "" : `${signed(moved)} by guidance, `;
    this.end.textContent = `${count} token${count === 1 ? "" : "s"}, ${nats}${why}`;
  }

  press(event) {
    const tokens = [...this.records.keys()];
    const at = tokens.indexOf(event.target);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") this.open(event.target);
    else if (!tokens[to]) return;
    else this.focus(tokens[to]);
    event.preventDefault(); // a blank would scroll
  }

  focus(token) {
    for (const other of this.records.keys()) other.tabIndex = other === token ? 0 : -1;
    token.focus();
  }

  /* Shows the candidates of a token; the same token again hides them. */
  open(token) {
    const record = this.records.get(token);
    if (!record) return; // between tokens
    const shut = token.getAttribute("aria-pressed") === "true";
    for (const other of this.records.keys()) other.setAttribute("aria-pressed", String(other === token && !shut));
    this.focus(token);
    this.panel.hidden = shut;
    const drawn = element("b", visible(record.candidates.find((one) => one.drawn).token));
    const place = [...this.records.keys()].indexOf(token);
    const moved = this.method === "plain" ? "" : `, ${signed(record.nats)} by guidance`;
    this.panel.querySelector("caption").replaceChildren(`Token ${place + 1}: `, drawn, moved);
    const others = { ...record.others, token: null };
    const rows = [...record.candidates, ...(record.rest ? [others] : [])].map(row);
    this.panel.querySelector("tbody").replaceChildren(...rows);
    this.panel.scrollIntoView({ block: "nearest" });
  }
}

/* A candidate in the table; without a token: all others together. */
function row({ token, ref_prob, reward, prob, drawn }) {
  const made = element("tr", "", drawn ? "drawn" : token === null ? "rest" : "");
  const name = element("th", token === null ? "others" : visible(token));
  name.scope = "row";
  if (drawn) name.append(element("span", "drawn", "mark"));
  made.append(name, bar("ref", ref_prob), element("td", reward?.toFixed(3) ?? ""), bar("guided", prob));
  return made;
}

function bar(sort, prob) {
  const [svg, rect] = ["svg", "rect"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  rect.setAttribute("width", `${(100 * prob).toFixed(1)}%`);
  rect.setAttribute("height", "4");
  svg.setAttribute("aria-hidden", "true");
  svg.append(rect);
  const cell = element("td", number(prob), sort);
  cell.append(svg);
  return cell;
}

// The form ------------------------------------------------------------------------------------------------------------

/* What the form says, but for beta; what is empty is left to the server. */
function settings() {
  const found = model.pargs.chat
    ? { messages: [{ role: "user", content: $("prompt").value }], logprobs: true, top_logprobs: 10 }
    : { prompt: $("prompt").value, logprobs: 10 };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"])
    if ($(name).value) found[name] = Number($(name).value);
  return found;
}

function report(wrong = "") {
  const writing = columns.some((one) => one.state === "writing");
  const errors = [...new Set([wrong, ...columns.map((one) => one.wrong)])].filter(Boolean);
  const stopped = columns.some((one) => one.state === "stopped");
  $("status").textContent = errors.join(" ") || (writing ? "Writing …" : stopped ? "Stopped." : asked ? "Done." : "");
  $("status").className = errors.length ? "wrong" : "";
  $("stop").disabled = !writing;
}

function reseed() {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
}

/* Asks the server what it offers, and shows what can be asked of it. */
async function connect() {
  try {
    model = (await (await fetched("v1/models")).json()).data[0];
  } catch (wrong) {
    $("key").focus(); // if the server wants one
    return report(wrong.message);
  }
  const { method, methods, beta, chat, max_tokens } = model.pargs;
  const guided = method === "plain" ? methods.find((one) => one !== "plain") : method;
  const most = Math.max(5, Math.ceil(3 * Math.abs(beta)));
  $("model").textContent = model.id;
  document.title = `${model.id} · Playground`;
  $("prompt").placeholder = chat ? "Tell me a story about a dog." : "Once upon a time there was a dog";
  const step = beta === Number(beta.toFixed(1)) ? 0.1 : 0.01;
  Object.assign($("beta"), { min: beta < 0 ? -most : 0, max: most, step, value: beta });
  $("shown").textContent = $("beta").value;
  $("strength").hidden = !guided;
  document.body.classList.toggle("alone", !guided);
  Object.assign($("max_tokens"), { max: max_tokens, placeholder: max_tokens });
  $("texts").replaceChildren();
  columns = ["plain", guided].filter(Boolean).map((one) => new Column(one));
  $("unlock").hidden = true;
  $("ask").hidden = document.querySelector("footer").hidden = false;
  report();
  $("prompt").focus();
}

$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  connect();
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  asked = settings();
  for (const column of columns) column.write(asked);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => columns.forEach((one) => one.stop.abort()));
$("reseed").addEventListener("click", reseed);
$("beta").addEventListener("input", () => ($("shown").textContent = $("beta").value));

let waiting;
$("beta").addEventListener("change", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    // if anything else has changed too, the two texts would differ by more than guidance
    if (asked && JSON.stringify(asked) === JSON.stringify(settings())) columns[1].write(asked);
  }, BETA_WAIT);
});

reseed();
connect();

// The page of a pliant server: a chat, and the memory as a picture. No library, no build.

const MIB = 2 ** 20;
const POINTS = 120; // of the picture: one a second
const OWNERS = { // from below; those that are not here come last
  interpreter: '--interpreter', server: '--server', base: '--base', kv: '--kv', weights: '--weights',
};
const $ = (id) => document.getElementById(id);
const SVG = 'http://www.w3.org/2000/svg';

let key = sessionStorage.getItem('key') || '';
let last = null; // the state before, for speeds
let history = [];
let dragged = null; // bytes, while the line is held
let moving = false;
let moves = 0;

function size(bytes) {
  return bytes < 10 * 2 ** 30 ? `${(bytes / MIB).toFixed(0)} MiB` : `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}

async function call(path, options = {}) {
  const headers = { ...(options.body ? { 'Content-Type': 'application/json' } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const reply = await fetch(path, { ...options, headers });
  if (reply.status === 401) $('key-form').hidden = false;
  if (!reply.ok) {
    const body = await reply.json().catch(() => ({}));
    throw new Error(body.error?.message || `the server says ${reply.status}`);
  }
  return reply;
}

// --- the state, once a second while the page is seen

async function poll() {
  if (document.visibilityState === 'visible') {
    try {
      const state = await (await call('/v1/state')).json();
      $('status').textContent = '';
      show(state);
    } catch (error) {
      $('status').textContent = error instanceof TypeError ? 'The server does not answer.' : error.message;
    }
  }
  setTimeout(poll, 1000);
}

function show(state) {
  const budget = state.budget;
  $('model').textContent = state.model;
  document.title = `pliant: ${state.model}`;
  const kl = budget.expected_kl === null ? '' : `, expected KL ${Number(budget.expected_kl.toPrecision(2))}`;
  $('quality').textContent = budget.bits_per_weight === null ? 'plain weights'
    : `${budget.bits_per_weight.toFixed(2)} bits per weight${kl}, context ${budget.context} tokens`;
  history.push(budget);
  if (history.length > POINTS) history.shift();
  draw(budget);
  legend(budget);
  ledger(budget);
  depth(state.matrices);
  work(state);
  last = state;
}

function scaleTop(budget) {
  return 1.06 * Math.max(budget.most, budget.memory || 0, ...history.map((one) => one.resident));
}

function draw(budget) {
  $('budget-text').textContent = `${size(budget.resident)} in memory, at most ${size(budget.peak)} so far; `
    + (budget.memory === null ? 'no limit is set.' : `the budget is ${size(budget.memory)}.`);
  const svg = $('areas'), top = scaleTop(budget);
  svg.setAttribute('viewBox', `0 0 ${POINTS - 1} ${top}`);
  const names = owners(budget);
  const floor = new Array(history.length).fill(0);
  const first = POINTS - history.length;
  const shapes = names.map((name) => {
    const under = floor.slice();
    history.forEach((one, i) => { floor[i] += one.ledger[name]?.touched || 0; });
    const at = (values, i) => `${first + i},${top - values[i]}`;
    const up = floor.map((_, i) => at(floor, i)), back = under.map((_, i) => at(under, i)).reverse();
    const shape = document.createElementNS(SVG, 'polygon');
    shape.setAttribute('points', [...up, ...back].join(' '));
    shape.style.fill = `var(${OWNERS[name] || '--small'})`;
    return shape;
  });
  svg.replaceChildren(...shapes);
  if (dragged === null && !moving) placeLine(budget.memory, budget);
}

function owners(budget) {
  const known = Object.keys(OWNERS).filter((name) => name in budget.ledger);
  const others = Object.keys(budget.ledger).filter((name) => !(name in OWNERS));
  return [...known.slice(0, 3), ...others, ...known.slice(3)];
}

function placeLine(bytes, budget) {
  const line = $('line'), shown = bytes ?? budget.most;
  const part = 1 - shown / scaleTop(budget);
  line.style.top = `${100 * Math.max(part, 0)}%`;
  line.classList.toggle('free', bytes === null);
  line.classList.toggle('high', part < 0.1);
  const text = bytes === null ? 'no limit' : size(bytes);
  $('line-text').textContent = text;
  line.setAttribute('aria-valuemin', Math.ceil(budget.least / MIB));
  line.setAttribute('aria-valuemax', Math.ceil(budget.most / MIB));
  line.setAttribute('aria-valuenow', Math.round(shown / MIB));
  line.setAttribute('aria-valuetext', text);
}

function chipOf(colour) {
  const chip = document.createElement('span');
  chip.className = 'chip';
  chip.style.background = `var(${colour})`;
  return chip;
}

function legend(budget) {
  const sums = new Map(); // by colour: the small ones share one
  for (const name of owners(budget).reverse()) {
    const colour = OWNERS[name] || '--small', before = sums.get(colour);
    const touched = budget.ledger[name].touched + (before?.touched || 0);
    sums.set(colour, { name: colour === '--small' ? 'others' : name, touched });
  }
  $('legend').replaceChildren(...[...sums].map(([colour, { name, touched }]) => {
    const entry = document.createElement('span');
    entry.append(chipOf(colour), `${name} ${size(touched)}`);
    return entry;
  }));
}

function ledger(budget) {
  const rows = owners(budget).reverse().map((name) => {
    const { touched, held } = budget.ledger[name];
    const row = document.createElement('tr'), head = document.createElement('th');
    head.scope = 'row';
    head.append(chipOf(OWNERS[name] || '--small'), name);
    row.append(head, ...[touched, held].map((bytes) => {
      const cell = document.createElement('td');
      cell.textContent = `${(bytes / MIB).toFixed(1)} MiB`;
      return cell;
    }));
    return row;
  });
  $('ledger').tBodies[0].replaceChildren(...rows);
}

// --- depth: a row for each kind of matrix, a column for each layer

function shade(plies) {
  // From pale to dark blue; the text on it changes sides in the middle.
  const part = Math.min(Math.max(plies / 8, 0), 1);
  return { back: `hsl(215 65% ${92 - 62 * part}%)`, text: part > 0.45 ? '#ffffff' : '#15202e' };
}

let depthShown = '';

function depth(matrices) {
  const told = JSON.stringify(matrices);
  if (told === depthShown) return;
  depthShown = told;
  const kinds = new Map();
  let layers = 0;
  for (const [name, plies] of Object.entries(matrices)) {
    const found = /^layers\.(\d+)\.(\w+)$/.exec(name);
    const [kind, layer] = found ? [found[2], Number(found[1])] : [name, null];
    if (!kinds.has(kind)) kinds.set(kind, new Map());
    kinds.get(kind).set(layer, plies);
    if (layer !== null) layers = Math.max(layers, layer + 1);
  }
  const head = document.createElement('tr');
  head.append(document.createElement('td'));
  for (let layer = 0; layer < layers; layer++) {
    const cell = document.createElement('th');
    cell.scope = 'col';
    const text = document.createElement('span');
    text.className = layer % 5 ? 'hidden' : '';
    text.textContent = layer;
    cell.append(text);
    head.append(cell);
  }
  const cellOf = (plies, name, span) => {
    const cell = document.createElement('td'), colours = shade(plies);
    cell.textContent = span > 1 ? plies.toFixed(2) : plies.toFixed(0);
    cell.title = `${name}: ${plies.toFixed(2)} plies`;
    cell.style.background = colours.back;
    cell.style.color = colours.text;
    cell.colSpan = span;
    return cell;
  };
  const rows = [...kinds].map(([kind, values]) => {
    const row = document.createElement('tr'), name = document.createElement('th');
    name.scope = 'row';
    name.textContent = kind;
    row.append(name);
    if (values.has(null)) row.append(cellOf(values.get(null), kind, Math.max(layers, 1)));
    else for (let layer = 0; layer < layers; layer++) row.append(cellOf(values.get(layer) ?? 0, `${kind} of layer ${layer}`, 1));
    return row;
  });
  $('depth').tHead.replaceChildren(head);
  $('depth').tBodies[0].replaceChildren(...rows);
  $('scale').replaceChildren('plies: ', ...Array.from({ length: 9 }, (_, plies) => {
    const step = document.createElement('span'), colours = shade(plies);
    step.textContent = plies;
    step.style.background = colours.back;
    step.style.color = colours.text;
    return step;
  }));
}

function work(state) {
  const kv = state.kv;
  $('running').textContent = state.running;
  $('parked').textContent = state.budget.parked;
  $('waiting').textContent = state.waiting;
  $('pages').textContent = `${kv.pages - kv.kept}, ${kv.kept}; ${size(Math.max(kv.bytes - kv.used, 0))}`;
  if (!last) return;
  const passed = Math.max(state.time - last.time, 0.001), now = state.counters, before = last.counters;
  const steps = now.steps - before.steps;
  $('answers').textContent = `${((now.answer_tokens - before.answer_tokens) / passed).toFixed(0)}/s`;
  $('prompts').textContent = `${((now.prompt_tokens - before.prompt_tokens) / passed).toFixed(0)}/s`;
  $('step').textContent = steps ? `${(1000 * (now.step_seconds - before.step_seconds) / steps).toFixed(1)} ms` : '-';
}

// --- moving the budget

async function move(memory) {
  const mine = ++moves; // an older move that is answered later has nothing to say any more
  moving = true;
  note('moving …');
  let said = '', bad = false, budget = null;
  try {
    budget = await (await call('/v1/budget', { method: 'PUT', body: JSON.stringify({ memory }) })).json();
    const kl = budget.expected_kl === null ? '' : `, expected KL ${Number(budget.expected_kl.toPrecision(2))}`;
    said = budget.bits_per_weight === null ? 'moved' : `now ${budget.bits_per_weight.toFixed(2)} bits per weight${kl}`;
  } catch (error) {
    [said, bad] = [error.message, true];
  }
  if (mine !== moves) return;
  moving = false;
  note(said, bad);
  if (budget) placeLine(budget.memory, budget);
}

function note(text, bad = false) {
  $('budget-note').textContent = text;
  $('budget-note').classList.toggle('bad', bad);
}

function bytesAt(y) {
  const box = $('chart').getBoundingClientRect(), budget = last.budget;
  const bytes = (1 - (y - box.top) / box.height) * scaleTop(budget);
  return Math.round(Math.min(Math.max(bytes, budget.least), budget.most) / MIB) * MIB;
}

function drag(event) {
  if (dragged === null) return;
  dragged = Math.max(bytesAt(event.clientY), Math.ceil(last.budget.least / MIB) * MIB);
  placeLine(dragged, last.budget);
}

$('line').addEventListener('pointerdown', (event) => {
  if (!last) return;
  $('line').setPointerCapture(event.pointerId);
  $('line').classList.add('dragged');
  dragged = last.budget.memory ?? last.budget.most;
});
$('line').addEventListener('pointermove', drag);
$('line').addEventListener('pointerup', (event) => {
  if (dragged === null) return;
  drag(event);
  const bytes = dragged;
  dragged = null;
  $('line').classList.remove('dragged');
  move(bytes);
});
$('line').addEventListener('pointercancel', () => { dragged = null; });

let keyTimer = 0;
$('line').addEventListener('keydown', (event) => {
  if (!last) return;
  const budget = last.budget, least = Math.ceil(budget.least / MIB) * MIB;
  const steps = { ArrowUp: 5, ArrowRight: 5, ArrowDown: -5, ArrowLeft: -5, PageUp: 50, PageDown: -50 };
  let bytes = dragged ?? budget.memory ?? budget.most;
  if (event.key in steps) bytes += steps[event.key] * MIB;
  else if (event.key === 'Home') bytes = least;
  else if (event.key === 'End') bytes = budget.most;
  else return;
  event.preventDefault();
  dragged = Math.min(Math.max(bytes, least), budget.most);
  placeLine(dragged, budget);
  clearTimeout(keyTimer); // once the keys rest
  keyTimer = setTimeout(() => { const wanted = dragged; dragged = null; move(wanted); }, 500);
});

$('budget-form').addEventListener('submit', (event) => {
  event.preventDefault();
  const text = $('size').value.trim();
  if (text) move(/^\d+$/.test(text) ? Number(text) : text);
});
$('no-limit').addEventListener('click', () => move(null));
$('key-form').addEventListener('submit', (event) => {
  event.preventDefault();
  key = $('key').value;
  sessionStorage.setItem('key', key);
  $('key-form').hidden = true;
});

// --- the chat

const messages = [];
let answering = null;

function say(role, text) {
  $('log').querySelector('.empty')?.remove();
  const box = document.createElement('div'), who = document.createElement('span'), said = document.createElement('span');
  box.className = `message ${role}`;
  who.className = 'who';
  who.textContent = { user: 'You', assistant: 'Model', error: 'Error' }[role];
  said.textContent = text;
  box.append(who, said);
  $('log').append(box);
  $('log').scrollTop = $('log').scrollHeight;
  return { box, said };
}

async function answer() {
  const { box, said } = say('assistant', '');
  answering = new AbortController();
  $('send').disabled = true;
  $('stop').disabled = false;
  const begin = performance.now();
  let text = '', made = null, tokens = 0;
  try {
    const reply = await call('/v1/chat/completions', {
      method: 'POST',
      signal: answering.signal,
      body: JSON.stringify({
        messages, stream: true, stream_options: { include_usage: true },
        temperature: Number($('temperature').value), max_tokens: Number($('length').value),
      }),
    });
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let held = ''; ;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (held + value).split('\n\n');
      held = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, '');
        if (data === '[DONE]') continue;
        const event = JSON.parse(data);
        if (event.error) throw new Error(event.error.message);
        text += event.choices[0]?.delta.content || '';
        made = event.pliant || made;
        tokens = event.usage?.completion_tokens || tokens;
      }
      said.textContent = text;
      $('log').scrollTop = $('log').scrollHeight;
    }
  } catch (error) {
    if (error.name !== 'AbortError') say('error', error.message);
  }
  answering = null;
  $('send').disabled = false;
  $('stop').disabled = true;
  if (text) messages.push({ role: 'assistant', content: text });
  else box.remove();
  if (made) {
    const line = document.createElement('span'), rate = tokens / ((performance.now() - begin) / 1000);
    line.className = 'made';
    const bits = made.bits_per_weight === null ? '' : `, ${made.bits_per_weight.toFixed(2)} bits per weight`;
    const kl = made.expected_kl === null ? '' : `, expected KL ${Number(made.expected_kl.toPrecision(2))}`;
    line.textContent = `${tokens} tokens, ${rate.toFixed(0)}/s${bits}${kl}`;
    box.append(line);
  }
}

$('chat-form').addEventListener('submit', (event) => {
  event.preventDefault();
  const text = $('prompt').value.trim();
  if (!text || answering) return;
  $('prompt').value = '';
  messages.push({ role: 'user', content: text });
  say('user', text);
  answer();
});
$('prompt').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $('chat-form').requestSubmit();
  }
});
$('stop').addEventListener('click', () => answering?.abort());
$('clear').addEventListener('click', () => {
  answering?.abort();
  messages.length = 0;
  $('log').replaceChildren();
  $('prompt').focus();
});

poll();

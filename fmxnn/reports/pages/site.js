const ROW = 52;
const SPARE = 8;
const HELD = 24;
const by = (id) => document.getElementById(id);
const scroll = by("scroll");
const rows = by("rows");
const detail = by("detail");
const search = by("search");
const only = by("only");
const heads = [...document.querySelectorAll("[data-column]")];
const places = new Map();
const bunches = new Map();
const waiting = new Set();
let all = null;
let words = [];
let order = [];
let sorted = { column: "latents", down: false };
let ranked = true; // what is searched for comes by how well it fits, until a column is asked for
let chosen = -1;

const FEW = 10;
const OFTEN = 0.1;
const FILTERS = {
  all: () => true,
  firing: (row) => all.fired[row] > 0,
  rare: (row) => all.fired[row] > 0 && all.fired[row] < FEW,
  often: (row) => all.fired[row] > OFTEN * all.tokens,
  dead: (row) => all.fired[row] === 0,
};

function load(file) {
  if (waiting.has(file)) return;
  waiting.add(file);
  const script = document.createElement("script");
  script.src = file;
  script.onload = () => { waiting.delete(file); script.remove(); };
  script.onerror = () => {
    waiting.delete(file);
    script.remove();
    say(file + " is missing or cannot be read; keep all files of this folder together.");
  };
  document.head.append(script);
}

function table(given) {
  all = given;
  words = all.words.map(folded);
  all.latents.forEach((latent, row) => places.set(latent, row));
  for (const option of only.options) {
    let count = 0;
    for (let row = 0; row < all.latents.length; row += 1) count += FILTERS[option.value](row);
    option.textContent += " (" + count.toLocaleString("en") + ")";
  }
  arrange();
  route();
  document.documentElement.dataset.ready = "yes";
}

function cards(bunch, given) {
  bunches.delete(bunch);
  bunches.set(bunch, given);
  if (bunches.size > HELD) bunches.delete(bunches.keys().next().value);
  if (chosen >= 0 && Math.floor(chosen / all.bunch) === bunch) show();
}

function say(text) {
  const said = document.createElement("p");
  said.className = "never";
  said.textContent = text;
  detail.replaceChildren(said);
}

function arrange() {
  const query = search.value.trim();
  const score = query === "" ? null : scores(all.latents, words, [all.top, all.promoted, all.demoted], query);
  const column = all[sorted.column];
  const sign = sorted.down ? -1 : 1;
  order = [];
  for (let row = 0; row < all.latents.length; row += 1) {
    if (FILTERS[only.value](row) && (score === null || score[row] > 0)) order.push(row);
  }
  const fit = score !== null && ranked;
  order.sort((a, b) => (fit ? score[b] - score[a] : 0) || compared(column[a], column[b], sign) || a - b);
  const found = order.length.toLocaleString("en");
  const total = all.latents.length.toLocaleString("en");
  by("count").value = order.length === all.latents.length ? total + " latents" : found + " of " + total;
  by("none").hidden = order.length > 0;
  for (const head of heads) {
    const here = !fit && head.dataset.column === sorted.column;
    head.parentElement.setAttribute("aria-sort", here ? (sorted.down ? "descending" : "ascending") : "none");
  }
  rows.style.height = order.length * ROW + "px";
  scroll.scrollTop = 0;
  draw();
}

function compared(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  return sign * (a - b);
}

function draw() {
  const first = Math.max(0, Math.floor(scroll.scrollTop / ROW) - SPARE);
  const last = Math.min(order.length, Math.ceil((scroll.scrollTop + scroll.clientHeight) / ROW) + SPARE);
  const asked = terms(search.value);
  const made = [];
  for (let at = first; at < last; at += 1) made.push(line(at, asked));
  rows.replaceChildren(...made);
}

function line(at, asked) {
  const row = order[at];
  const made = element("a", "row" + (row === chosen ? " chosen" : ""));
  made.href = "#latent-" + all.latents[row];
  made.style.top = at * ROW + "px";
  const dead = all.fired[row] === 0;
  made.append(
    element("span", "name", all.latents[row]),
    element("span", "figure", dead ? "0 %" : percent(all.fired[row] / all.tokens)),
    element("span", "figure", dead ? "–" : fixed(all.largest[row])),
    element("span", "figure", fixed(all.norm[row])),
    element("span", "figure", fixed(all.functional[row])),
  );
  const texts = element("span", "texts");
  texts.append(chips("fires", all.top[row], asked, dead ? "never fires" : "only negative"));
  if (all.promoted[row].length > 0) texts.append(chips("raises", all.promoted[row], asked, ""));
  made.append(texts);
  return made;
}

function chips(name, numbers, asked, otherwise) {
  const made = element("span", name);
  if (numbers.length === 0) made.append(element("i", "", otherwise));
  for (const number of numbers) {
    const chip = element("bdi", "chip");
    chip.append(...marked(all.words[number], asked));
    made.append(chip);
  }
  return made;
}

function marked(text, asked) {
  const small = text.replaceAll("␣", " ").toLowerCase();
  for (const term of small.length === text.length ? asked : []) {
    const at = small.indexOf(term);
    if (at >= 0) {
      const mark = element("mark", "", text.slice(at, at + term.length));
      return [text.slice(0, at), mark, text.slice(at + term.length)];
    }
  }
  return [text];
}

function element(tag, kind, text) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

function percent(share) {
  const value = 100 * share;
  return (value < 0.001 ? "<0.001" : value.toFixed(value < 1 ? 3 : 2)) + " %";
}

function fixed(value) {
  return value === null ? "–" : value.toFixed(2);
}

function route() {
  const latent = /^#latent-(\d+)$/.exec(location.hash);
  chosen = latent && places.has(Number(latent[1])) ? places.get(Number(latent[1])) : -1;
  document.body.classList.toggle("reading", latent !== null);
  reveal();
  draw();
  if (chosen >= 0) show();
  else if (latent) say("There is no latent " + latent[1] + " here.");
  else say("Choose a latent.");
}

// The chosen latent's row is brought into sight where a link has led to it from elsewhere.
function reveal() {
  const top = order.indexOf(chosen) * ROW;
  const hidden = top < scroll.scrollTop || top + ROW > scroll.scrollTop + scroll.clientHeight;
  if (top >= 0 && hidden && scroll.clientHeight > 0) scroll.scrollTop = top - (scroll.clientHeight - ROW) / 2;
}

function show() {
  const bunch = Math.floor(chosen / all.bunch);
  const held = bunches.get(bunch);
  if (!held) {
    say("Reading …");
    load("cards-" + String(bunch).padStart(5, "0") + ".js");
    return;
  }
  detail.innerHTML = held[chosen % all.bunch];
  detail.prepend(steps());
  detail.scrollTop = 0;
  highlight();
}

function steps() {
  const made = element("p", "steps");
  const at = order.indexOf(chosen);
  const back = element("a", "back", "all latents");
  back.href = "#";
  made.append(back);
  for (const [text, next] of [["previous", at - 1], ["next", at + 1]]) {
    const link = element("a", "", text);
    if (at >= 0 && next >= 0 && next < order.length) link.href = "#latent-" + all.latents[order[next]];
    made.append(link);
  }
  return made;
}

// What was searched for is marked in the card, too, where the browser can do so without changing it.
function highlight() {
  if (!window.CSS || !CSS.highlights) return;
  CSS.highlights.delete("found");
  const asked = terms(search.value);
  if (asked.length === 0) return;
  const ranges = [];
  const walker = document.createTreeWalker(detail, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.toLowerCase();
    if (text.length !== walker.currentNode.data.length) continue;
    for (const term of asked) {
      for (let at = text.indexOf(term); at >= 0; at = text.indexOf(term, at + term.length)) {
        const range = new Range();
        range.setStart(walker.currentNode, at);
        range.setEnd(walker.currentNode, at + term.length);
        ranges.push(range);
      }
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

let due = 0;
scroll.addEventListener("scroll", () => {
  if (due === 0) due = requestAnimationFrame(() => { due = 0; draw(); });
});
search.addEventListener("input", () => { ranked = true; if (all) { arrange(); highlight(); } });
search.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && order.length > 0) location.hash = "#latent-" + all.latents[order[0]];
});
only.addEventListener("change", () => { if (all) arrange(); });
for (const head of heads) {
  head.addEventListener("click", () => {
    const column = head.dataset.column;
    sorted = { column, down: sorted.column === column ? !sorted.down : column !== "latents" };
    ranked = false;
    if (all) arrange();
  });
}
addEventListener("hashchange", () => { if (all) route(); });
addEventListener("resize", () => { if (all) draw(); });
load("table.js");

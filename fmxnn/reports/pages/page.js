"use strict";
const main = document.getElementById("latents");
const cards = [...main.children];
const search = document.getElementById("search");
const sort = document.getElementById("sort");
const texts = new Map();

function text(card) {
  if (!texts.has(card)) texts.set(card, [...card.querySelectorAll(".top, .logits")].map((part) => part.textContent).join(" ").toLowerCase());
  return texts.get(card);
}

function filter() {
  const asked = search.value.trim().toLowerCase();
  const number = /^\d+$/.test(asked);
  let found = 0;
  for (const card of cards) {
    card.hidden = asked !== "" && (number ? card.id !== "latent-" + Number(asked) : !text(card).includes(asked));
    found += !card.hidden;
  }
  document.getElementById("count").value = found === cards.length ? found + " latents" : found + " of " + cards.length;
  document.getElementById("none").hidden = found > 0;
}

function order() {
  const by = (card) => { const value = parseFloat(card.dataset[sort.value]); return Number.isNaN(value) ? -Infinity : value; };
  main.append(...cards.sort((a, b) => by(b) - by(a) || b.dataset.place - a.dataset.place));
}

function show() {
  const card = document.getElementById(location.hash.slice(1));
  if (card && card.hidden) { search.value = ""; filter(); }
  if (card) card.scrollIntoView();
}

search.addEventListener("input", filter);
sort.addEventListener("change", order);
addEventListener("hashchange", show);

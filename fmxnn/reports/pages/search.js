"use strict";
// Which latents a query means, best first. A table has `words` and, for each latent, lists of their numbers.

function folded(word) {
  return word.replaceAll("␣", " ").trim().toLowerCase();
}

function terms(query) {
  return query.replaceAll("␣", " ").toLowerCase().split(/\s+/).filter((term) => term !== "");
}

// How well each word fits a term: 3 is the whole, 2 its beginning, 1 a part, 0 none.
function fits(words, term) {
  return Uint8Array.from(words, (word) => (word === term ? 3 : word.startsWith(term) ? 2 : word.includes(term) ? 1 : 0));
}

// Of each latent, the sum over terms of the best fit among its words, earlier ones before later ones; 0 where a term
// fits none of them. `lists` are top tokens, promoted, demoted, in this order. A latent's own number comes before all.
function scores(latents, words, lists, query) {
  const asked = terms(query);
  const fitting = asked.map((term) => fits(words, term));
  const number = asked.length === 1 && /^\d+$/.test(asked[0]) ? Number(asked[0]) : -1;
  return Float64Array.from(latents, (latent, row) => {
    if (latent === number) return 1e6;
    let sum = 0;
    for (const fit of fitting) {
      let best = 0;
      let place = 0;
      for (const list of lists) {
        for (const word of list[row]) {
          if (fit[word] > 0) best = Math.max(best, 64 * fit[word] - place);
          place += 1;
        }
      }
      if (best === 0) return 0;
      sum += best;
    }
    return sum;
  });
}

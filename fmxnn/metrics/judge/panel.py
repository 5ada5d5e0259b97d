"""Pseudo-latents made by hand, on which a judge shows that it tells meaning from form."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fmxnn.metrics.firing import TopToken

Truth = Literal["semantic", "surface", "neither", "both"]
_MARKED = re.compile("<<(.*?)>>")
_SEMANTIC = {
    "illness and care": (
        "two hours after the accident the << surgeon>> washed his hands again",
        "she had been << coughing>> for a week and could not sleep",
        "the whole village was << feverish>>, and the well was closed",
        "<<Hospitals>> in the north ran out of beds before Christmas",
        "they gave him an << inject>>ion and told him to lie still",
        "the wound had begun to << heal>> by the time the snow melted",
        "ask whether the tablets are safe for << asthm>>atic children",
        "her << diagnosis>> came late, though not too late",
        "Grandfather lay <<sick>> in the room above the bakery",
        "the clinic will << vaccinate>> everyone over sixty next month",
    ),
    "water at sea": (
        "the << tide>> turned and the boats lifted off the mud",
        "<<Sailing>> past the cape took the crew eleven days",
        "a grey << ocean>>ic swell rolled in under the fog",
        "he had never << swum>> so far from the shore",
        "the old lighthouse warns ships of the << reef>>",
        "<<Waves>> broke over the harbour wall all night",
        "the gulls followed them << offshore>> until dark",
        "the deck was << salty>> and slippery after the storm",
        "the divers brought up an << anchor>> green with age",
        "the << maritime>> museum opens again in spring",
    ),
    "anger": (
        "he slammed the door, << furious>> at being lied to",
        "the crowd began to << rage>> against the new tax",
        "<<Outraged>> parents filled the school hall on Monday",
        "she answered << irritably>> and went on typing",
        "do not let your << temper>> write the letter for you",
        "it still << infuri>>ates me that nobody apologised",
        "his voice shook with << wrath>> as he read the verdict",
        "<<Angry>> letters have reached the editor all week",
        "the referee was << glaring>> at both captains",
        "they << resented>> every minute of the delay",
    ),
    "money owed and paid": (
        "the << bank>> refused to extend the term any further",
        "he << owed>> his brother more than he could count",
        "<<Invoices>> are to be settled within thirty days",
        "a << solvent>> company does not fear its auditors",
        "they agreed to << repay>> half of it before winter",
        "the << mort>>gage on the farm was older than the barn",
        "she went quietly << bankrupt>> in the second year",
        "the << creditors>> met in a hotel near the court",
        "<<Borrowing>> has become dearer since the spring",
        "the fine is << payable>> at any post office",
    ),
}
_SURFACE = {
    "words that end in -ly": (
        "the train moved << slowly>> out of the tunnel",
        "it was << hardly>> the place for a picnic",
        "the colours are << evenly>> spread over the page",
        "he speaks Danish << fluently>> and reads Polish",
        "the two results differ << slightly>> in the third digit",
        "<<Suddenly>> the projector stopped",
        "the parcel arrived << safely>> on Thursday",
        "the committee << formally>> closed the session",
        "she is << probably>> still at the library",
        "these stars are << extremely>> far away",
    ),
    "an opening bracket": (
        "the second edition<< (>>1911) has more plates",
        "return sum<<(>>values) / len(values)",
        "the tenor<< ((>>and not only he) came in late",
        "see the appendix<<[>>3] for the proof",
        "the capital<< (>>then a fishing town) grew quickly",
        "const names = <<[>>'north', 'south']",
        "if<< (>>count > 0) break;",
        "the recipe calls for butter<< [>>or oil]",
        "while<<(>>true) { step(); }",
        "a map<<{>>String, int} of the words in it",
    ),
    "a capital at the start of a sentence": (
        "it rained all day. <<The>> match was moved to Sunday.",
        "nobody had the key. <<When>> the janitor came, it was noon.",
        "the soup was cold. <<And>> the bread was worse.",
        "so much for theory. <<It>> works on the bench.",
        "we left at six. <<Perhaps>> that was too early.",
        "the lamp flickered. <<Behind>> it stood a clock.",
        "that was the plan. <<Nobody>> had read it.",
        "prices fell again. <<Some>> shops closed for good.",
        "the bridge is safe. <<After>> the repair it was tested twice.",
        "she shrugged. <<Then>> she dealt the cards.",
    ),
    "words that begin with con-": (
        "the garden was << concealed>> behind a hedge",
        "please << consult>> the map before you turn",
        "a << concrete>> step led down to the cellar",
        "the choir sang the << concluding>> verse twice",
        "this wire must not << conduct>> any heat",
        "a << conical>> tent stood at the edge of the field",
        "the twins << continued>> up the stairs",
        "nobody would << confess>> to the broken window",
        "the << contour>> of the hill is hardly visible",
        "she is << convinced>> that the parrot understands",
    ),
}
_NEITHER = {
    "drawn at random, 1": (
        "the << kettle>> had boiled dry by then",
        "nine of the << 14>> seats were empty",
        "please << forward>> this to the landlord",
        "it was << because>> of the wind, she said",
        "a << Portuguese>> guitar hung on the wall",
        "for i in << range>>(10): total += i",
        "the results are << sparse>> and noisy",
        "he << whistled>> to the dog",
        "a treaty was signed << in>> the old mill; few came",
        "the << qu>>arry closed in the autumn",
    ),
    "drawn at random, 2": (
        "they painted the << fence>> green",
        "the word is borrowed << from>> Greek",
        "it << shall>> be read aloud twice",
        "about << 3>>.2 kilograms of flour",
        "the violinist was << Hungarian>>, or said so",
        "he seems << clever>> enough for both of us",
        "import << json>> before the other modules",
        "who << else>> has seen the comet",
        "the ivy had << climbed>> to the chimney",
        "<<!>> she cried, and ran downstairs",
    ),
}
_BOTH = {
    "years in four digits": (
        "the treaty of << 1648>> ended the war",
        "born in << 1912>> in a small mining town",
        "the census of << 1871>> lists four children",
        "the building burned down in << 1755>>",
        "elections were held again in << 1994>>",
        "the summer of << 1816>> never came",
        "a second edition followed in << 1603>>",
        "he retired in << 1987>> and kept bees",
        "the railway reached the coast in << 1849>>",
        "the flood of << 1953>> broke the dykes",
    ),
    "cooking, in -ing": (
        "the kitchen was filled with the smell of << frying>> onions",
        "keep << stirring>> until the sauce is thick",
        "after << baking>> for an hour the crust is golden",
        "she is << boiling>> eggs for the picnic",
        "<<Roasting>> the peppers first makes them sweet",
        "the secret is << kneading>> the dough twice",
        "he was << grilling>> fish on the terrace",
        "<<Simmering>> takes longer than you would think",
        "try << seasoning>> it with thyme and lemon",
        "they were << chopping>> carrots for forty guests",
    ),
}


@dataclass(frozen=True)
class PseudoLatent:
    """A latent that nobody trained: its name, what it is, and contexts, the strongest first.

    The marked parts of the contexts are its top tokens.

    ```python
    from fmxnn.metrics.judge import PseudoLatent

    PseudoLatent("sea", "semantic", ("the << tide>> turned", "a grey << ocean>> swell")).top_tokens
    ```
    """

    name: str
    kind: Truth
    contexts: tuple[str, ...]

    @property
    def top_tokens(self) -> tuple[TopToken, ...]:
        """What a judge is shown of it."""
        count = len(self.contexts)
        return tuple(
            TopToken(marked[1], float(count - i), (context,))
            for i, context in enumerate(self.contexts)
            if (marked := _MARKED.search(context)) is not None
        )


def _members(kind: Truth, written: Mapping[str, tuple[str, ...]]) -> tuple[PseudoLatent, ...]:
    return tuple(PseudoLatent(name, kind, contexts) for name, contexts in written.items())


PANEL = (
    *_members("semantic", _SEMANTIC),
    *_members("surface", _SURFACE),
    *_members("neither", _NEITHER),
    *_members("both", _BOTH),
)
"""Four semantic, four surface, two that are neither and two that are both, ten tokens each."""

"""Which English words stand for which CelebA attribute?

One table, `SAYINGS`, read in both directions: forwards it draws training captions (`core/text/captions.py`), backwards
it understands prompts (`core/text/prompt_parser.py`). A row says "when this attribute has this value, these words may
be used in this place of a sentence". A weight of 0 marks words that are understood when a person types them but never
written into a caption. Words that no label can check ("angry", "shouting") stand for the nearest thing the labels do
say.

It does not know how sentences are built (`core/text/caption_grammar.py`) or taken apart
(`core/text/phrase_matcher.py`). The 40 attributes: Liu et al., "Deep Learning Face Attributes in the Wild", 2015,
https://arxiv.org/abs/1411.7766
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ATTRIBUTES: tuple[str, ...] = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes",
    "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling",
    "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace",
    "Wearing_Necktie", "Young",
)

# Places in a sentence:
#   noun     the person: "a woman"                      adj   before the noun or after "is": "young"
#   thing    after "with" or "has": "a goatee"          worn  also after "wearing": "earrings"
#   clothes  also after "in": "a hat"                   post  after the noun or after "is": "squinting"
#   lack     after "without" or "has no": "a goatee"    bare  the same, and "not wearing": "a hat"
#   not      after "not": "smiling"                     frame before "photo": "blurry"
#   head     "nose:big": an adjective and the part it describes, so that "big, pointy nose" can be one phrase
#   nothead  the same, denied: "hair that is not black"
# {poss} becomes her, his, their or the.


class Saying(NamedTuple):
    """One way to say that `attribute` is `value`; `facts` is all that the words claim, the chief claim first."""

    attribute: str
    value: bool
    slot: str
    text: str
    weight: int
    sex: str
    facts: tuple[tuple[str, bool], ...]


class Head(NamedTuple):
    """A part of the face (or the photograph) that takes adjectives."""

    article: str
    names: str      # with weights; the first is the plain one
    plural: bool
    compound: str   # "black-haired"


HEADS: dict[str, Head] = {
    "hair": Head("", "hair 30, locks 1", False, "haired"),
    "nose": Head("a", "nose", False, "nosed"),
    "eyebrows": Head("", "eyebrows 5, brows 2", True, "browed"),
    "eyes": Head("", "eyes", True, "eyed"),
    "lips": Head("", "lips", True, "lipped"),
    "cheeks": Head("", "cheeks", True, "cheeked"),
    "cheekbones": Head("", "cheekbones", True, "cheekboned"),
    "face": Head("a", "face", False, "faced"),
    "skin": Head("", "skin 6, complexion 1", False, "skinned"),
    "expression": Head("a", "expression 6, look 2", False, "expressioned"),
    "mouth": Head("a", "mouth", False, "mouthed"),
    "photo": Head("a", "photo 8, picture 5, portrait 5, photograph 3, image 3, headshot 2, close-up 2, shot 1, "
          "snapshot 1",
                  False, "photographed"),
}

_CLEAN = {"No_Beard": True, "Goatee": False, "Mustache": False, "5_o_Clock_Shadow": False}
_NOT_LIGHT = {"Blond_Hair": False, "Gray_Hair": False}
_LAUGH = {"Smiling": True, "Mouth_Slightly_Open": True}
_YELL = {"Mouth_Slightly_Open": True, "Smiling": False}


def weighted(items: str) -> list[tuple[str, int]]:
    """Split "young 8, youthful" into [("young", 8), ("youthful", 1)]."""
    pairs = []
    for item in items.split(","):
        text, _, weight = item.strip().rpartition(" ")
        pairs.append((text, int(weight)) if text and weight.isdigit() else (item.strip(), 1))
    return pairs


def _row(attribute: str, value: bool, slot: str, items: str, sex: str = "",
         facts: Mapping[str, bool] | None = None) -> list[Saying]:
    claims = tuple((facts or {attribute: value}).items())
    return [Saying(attribute, value, slot, text, weight, sex, claims) for text, weight in weighted(items)]


def _sayings() -> tuple[Saying, ...]:
    r = _row
    f, m = "f", "m"
    girl, boy = {"Male": False, "Young": True}, {"Male": True, "Young": True}
    gran, gramp = {"Male": False, "Young": False}, {"Male": True, "Young": False}
    rows = [
        # -- the person ------------------------------------------------------------------------------------------
        r("Male", False, "noun", "woman 40, lady 8, female 3, actress 4, businesswoman 1, gal 1, women 0, ladies 0, "
          "mother 0, mom 0, mum 0, wife 0, sister 0, queen 0, bride 0, waitress 0, girlfriend 0, housewife 0, "
          "actresses 0"),
        r("Male", False, "noun", "girl 8, girls 0, schoolgirl 0, daughter 0, princess 0", facts=girl),
        r("Male", False, "noun", "grandmother 1, grandma 1, granny 0, grandmothers 0", facts=gran),
        r("Male", True, "noun", "man 40, guy 8, gentleman 5, male 3, actor 4, businessman 1, fellow 1, dude 1, men 0, "
          "guys 0, gentlemen 0, father 0, dad 0, husband 0, brother 0, king 0, bloke 0, groom 0, waiter 0, "
          "boyfriend 0, chap 0"),
        r("Male", True, "noun", "boy 4, lad 1, boys 0, schoolboy 0, son 0, prince 0", facts=boy),
        r("Male", True, "noun", "grandfather 1, grandpa 1, granddad 0, grandfathers 0", facts=gramp),
        r("Young", True, "adj", "young 24, youthful 3, young-looking 1, younger 1, teenage 0, juvenile 0"),
        r("Young", True, "post", "in {poss} twenties 1, in {poss} thirties 1"),
        r("Young", True, "thing", "twenties 0, thirties 0, teens 0, 20s 0, 30s 0"),
        r("Young", True, "noun", "teenager 0, teen 0, child 0, kid 0, youngster 0, adolescent 0, youth 0, baby 0, "
          "toddler 0"),
        r("Young", True, "not", "old 2, elderly 1"),
        r("Young", False, "adj", "old 9, older 9, elderly 4, middle-aged 6, mature 3, aged 2, senior 2, elder 0, "
          "ageing 0, aging 0, ancient 0, retired 0, oldish 0"),
        r("Young", False, "post", "in {poss} fifties 1, in {poss} sixties 1"),
        r("Young", False, "thing", "fifties 0, sixties 0, seventies 0, eighties 0, nineties 0, 50s 0, 60s 0, 70s 0, "
          "80s 0, old age 0"),
        r("Young", False, "noun", "pensioner 0, retiree 0, grandparent 0"),
        r("Young", False, "not", "young 3, so young 1"),
        r("Attractive", True, "adj", "attractive 8, good-looking 3, gorgeous 1, nice-looking 0, stunning 0, hot 0, "
          "sexy 0"),
        r("Attractive", True, "adj", "beautiful 8, pretty 6, lovely 2, cute 1", f),
        r("Attractive", True, "adj", "handsome 12", m),
        r("Attractive", True, "head", "face:attractive 1"),
        r("Attractive", True, "head", "face:beautiful 1, face:pretty 1, face:lovely 0, face:gorgeous 0, "
          "face:cute 0", f),
        r("Attractive", True, "head", "face:handsome 2", m),
        r("Attractive", False, "adj", "plain-looking 2, ordinary-looking 2, plain 1, unattractive 1, ugly 0, homely 0"),
        r("Attractive", False, "head", "face:plain 1, face:ordinary 1"),
        r("Attractive", False, "not", "attractive 2, good-looking 1"),
        # -- build, face, skin -----------------------------------------------------------------------------------
        r("Chubby", True, "adj", "chubby 8, plump 2, overweight 2, heavyset 1, fat 1, obese 0, stocky 0, heavy-set 0"),
        r("Chubby", True, "head", "face:chubby 3, face:plump 1, face:full 1, face:fat 0, cheeks:chubby 2, "
          "cheeks:plump 1, cheeks:fat 0"),
        r("Chubby", False, "adj", "slim 4, slender 2, thin 2, lean 1, skinny 1"),
        r("Chubby", False, "head", "face:slim 2, face:thin 2, face:slender 1, face:lean 1, face:skinny 0"),
        r("Chubby", False, "not", "chubby 3, overweight 1"),
        r("Double_Chin", True, "thing", "a double chin"),
        r("Double_Chin", False, "lack", "a double chin"),
        r("Oval_Face", True, "head", "face:oval 10"),
        r("Oval_Face", True, "adj", "oval-faced 1"),
        r("Oval_Face", False, "head", "face:round 3, face:square 1, face:angular 1"),
        r("Oval_Face", False, "nothead", "face:oval 3"),
        r("Oval_Face", False, "lack", "an oval face 3"),
        r("Pale_Skin", True, "head", "skin:pale 10, skin:fair 4, skin:light 1, skin:white 0, skin:porcelain 0, "
          "face:pale 1"),
        r("Pale_Skin", True, "adj", "pale 3, pale-skinned 2, fair-skinned 1"),
        r("Pale_Skin", False, "not", "pale 3"),
        r("Pale_Skin", False, "nothead", "skin:pale 2"),
        r("Pale_Skin", False, "lack", "pale skin 4"),
        r("Pale_Skin", False, "head", "skin:dark 0, skin:tanned 0, skin:tan 0, skin:brown 0, skin:black 0, "
          "skin:olive 0"),
        r("Pale_Skin", False, "adj", "tanned 0"),
        r("High_Cheekbones", True, "head", "cheekbones:high 10, cheekbones:prominent 3, cheekbones:defined 1, "
          "cheekbones:strong 0"),
        r("High_Cheekbones", False, "head", "cheekbones:low 3"),
        r("High_Cheekbones", False, "lack", "high cheekbones 6, prominent cheekbones 2"),
        r("Rosy_Cheeks", True, "head", "cheeks:rosy 10, cheeks:pink 2, cheeks:red 1, cheeks:flushed 2"),
        r("Rosy_Cheeks", True, "adj", "rosy-cheeked 2, blushing 1"),
        r("Rosy_Cheeks", True, "thing", "blush 0"),
        r("Rosy_Cheeks", False, "lack", "rosy cheeks 5, pink cheeks 1"),
        r("Rosy_Cheeks", False, "head", "cheeks:pale 1"),
        # -- eyes, brows, nose, lips, mouth ----------------------------------------------------------------------
        r("Arched_Eyebrows", True, "head", "eyebrows:arched 10, eyebrows:curved 2"),
        r("Arched_Eyebrows", False, "head", "eyebrows:straight 3, eyebrows:flat 1"),
        r("Arched_Eyebrows", False, "lack", "arched eyebrows 3"),
        r("Bushy_Eyebrows", True, "head", "eyebrows:bushy 10, eyebrows:thick 5, eyebrows:heavy 1, eyebrows:full 1"),
        r("Bushy_Eyebrows", False, "head", "eyebrows:thin 4, eyebrows:sparse 1"),
        r("Bushy_Eyebrows", False, "lack", "bushy eyebrows 4, thick eyebrows 2"),
        r("Bags_Under_Eyes", True, "thing", "bags under {poss} eyes 6, bags under the eyes 5, eye bags 2, eyebags 0, "
          "dark circles under {poss} eyes 1, dark circles 0"),
        r("Bags_Under_Eyes", True, "head", "eyes:baggy 1, eyes:puffy 1, eyes:tired 2"),
        r("Bags_Under_Eyes", True, "adj", "tired 0, tired-looking 0, sleepy 0"),
        r("Bags_Under_Eyes", False, "lack", "bags under {poss} eyes 4, bags under the eyes 3, eye bags 2"),
        r("Narrow_Eyes", True, "head", "eyes:narrow 10, eyes:narrowed 2, eyes:small 1, eyes:squinting 1, "
          "eyes:squinted 0"),
        r("Narrow_Eyes", True, "post", "squinting 2"),
        r("Narrow_Eyes", True, "adj", "squinting 0, narrow-eyed 1"),
        r("Narrow_Eyes", False, "head", "eyes:big 3, eyes:wide 2, eyes:large 2, eyes:round 0"),
        r("Narrow_Eyes", False, "lack", "narrow eyes 4"),
        r("Big_Nose", True, "head", "nose:big 10, nose:large 6, nose:broad 2, nose:wide 2, nose:huge 0, nose:long 0"),
        r("Big_Nose", False, "head", "nose:small 7, nose:little 1, nose:tiny 0, nose:petite 0"),
        r("Big_Nose", False, "lack", "a big nose 4, a large nose 2"),
        r("Pointy_Nose", True, "head", "nose:pointy 8, nose:pointed 5, nose:sharp 3"),
        r("Pointy_Nose", False, "head", "nose:rounded 2, nose:round 1, nose:blunt 1"),
        r("Pointy_Nose", False, "lack", "a pointy nose 4, a pointed nose 2"),
        r("Big_Lips", True, "head", "lips:big 6, lips:full 8, lips:large 2, lips:plump 3, lips:thick 3"),
        r("Big_Lips", True, "adj", "full-lipped 1"),
        r("Big_Lips", False, "adj", "thin-lipped 1"),
        r("Big_Lips", False, "head", "lips:thin 7, lips:small 2, lips:narrow 1"),
        r("Big_Lips", False, "lack", "full lips 3, big lips 2"),
        r("Mouth_Slightly_Open", True, "thing", "{poss} mouth slightly open 9, {poss} mouth open 6, an open mouth 5, "
          "a slightly open mouth 2, mouth slightly open 2, mouth open 2, parted lips 2"),
        r("Mouth_Slightly_Open", True, "adj", "open-mouthed 2, speaking 0, talking 0, singing 0, yawning 0"),
        r("Mouth_Slightly_Open", True, "head", "mouth:open 0, mouth:opened 0, mouth:agape 0, lips:parted 0, "
          "lips:open 0"),
        r("Mouth_Slightly_Open", False, "thing", "{poss} mouth closed 6, a closed mouth 5, mouth closed 2, "
          "closed lips 2, {poss} lips closed 1"),
        r("Mouth_Slightly_Open", False, "head", "mouth:closed 0, mouth:shut 0, lips:closed 0, lips:sealed 0, "
          "lips:pressed 0"),
        r("Mouth_Slightly_Open", False, "lack", "an open mouth 1"),
        # -- expression ------------------------------------------------------------------------------------------
        r("Smiling", True, "adj", "smiling 14, grinning 2, cheerful 2, happy 4, joyful 1, beaming 0, smirking 0, "
          "delighted 0, friendly 0, joyous 0, jolly 0, excited 0"),
        r("Smiling", True, "post", "smiling 14, grinning 2"),
        r("Smiling", True, "thing", "a smile 7, a big smile 2, a broad smile 1, a smile on {poss} face 2, a grin 1, "
          "smiles 0, smirk 0, joy 0, happiness 0, bright smile 0, warm smile 0, gentle smile 0, wide smile 0, "
          "friendly smile 0"),
        r("Smiling", True, "head", "face:smiling 3, face:happy 1, face:cheerful 0, expression:happy 3, "
          "expression:cheerful 1, expression:smiling 0, expression:joyful 0, eyes:smiling 0"),
        r("Smiling", True, "post", "laughing 2", facts=_LAUGH),
        r("Smiling", True, "adj", "laughing 1, giggling 0", facts=_LAUGH),
        r("Smiling", True, "thing", "laugh 0, laughter 0", facts=_LAUGH),
        r("Smiling", False, "not", "smiling 16, grinning 1"),
        r("Smiling", False, "lack", "a smile 8"),
        r("Smiling", False, "adj", "serious 6, unsmiling 1, stern 1, solemn 1, sad 1, angry 1, grim 0, frowning 0, "
          "scowling 0, crying 0, furious 0, upset 0, worried 0, unhappy 0, gloomy 0, depressed 0, bored 0, annoyed 0, "
          "thoughtful 0"),
        r("Smiling", False, "post", "frowning 1, looking serious 2"),
        r("Smiling", False, "thing", "anger 0, frown 0, scowl 0, sadness 0, tears 0, rage 0, poker face 0"),
        r("Smiling", False, "head", "expression:serious 6, expression:neutral 5, expression:stern 1, expression:sad 1, "
          "expression:angry 1, expression:calm 1, expression:solemn 0, expression:blank 0, expression:grim 0, "
          "expression:thoughtful 0, face:serious 3, face:sad 0, face:angry 0, face:stern 0, face:straight 0, "
          "face:neutral 0"),
        r("Smiling", False, "post", "yelling 1, shouting 1, screaming 1", facts=_YELL),
        r("Smiling", False, "adj", "yelling 0, shouting 0, screaming 0", facts=_YELL),
        # -- hair ------------------------------------------------------------------------------------------------
        r("Black_Hair", True, "head", "hair:black 24, hair:raven 1"),
        r("Black_Hair", True, "adj", "black-haired 4"),
        r("Black_Hair", True, "head", "hair:dark 2", facts=_NOT_LIGHT),
        r("Black_Hair", True, "adj", "dark-haired 1", facts=_NOT_LIGHT),
        r("Brown_Hair", True, "head", "hair:brown 24, hair:chestnut 1, hair:brunette 1"),
        r("Brown_Hair", True, "adj", "brown-haired 4, brunette 2, brunet 0"),
        r("Brown_Hair", True, "head", "hair:dark 2", facts=_NOT_LIGHT),
        r("Brown_Hair", True, "adj", "dark-haired 1", facts=_NOT_LIGHT),
        r("Blond_Hair", True, "head", "hair:blond 16, hair:golden 2, hair:fair 1, hair:yellow 0"),
        r("Blond_Hair", True, "head", "hair:blonde 16", f),
        r("Blond_Hair", True, "head", "hair:blonde 2", m),
        r("Blond_Hair", True, "adj", "blond 5, blond-haired 2, fair-haired 1"),
        r("Blond_Hair", True, "adj", "blonde 6", f),
        r("Gray_Hair", True, "head", "hair:gray 10, hair:grey 10, hair:white 4, hair:silver 3, hair:graying 1, "
          "hair:greying 0, hair:salt and pepper 0"),
        r("Gray_Hair", True, "adj", "gray-haired 2, grey-haired 2, white-haired 1, silver-haired 1"),
        r("Straight_Hair", True, "head", "hair:straight 20"),
        r("Straight_Hair", True, "adj", "straight-haired 1"),
        r("Wavy_Hair", True, "head", "hair:wavy 18, hair:curly 7"),
        r("Wavy_Hair", True, "adj", "wavy-haired 1, curly-haired 1"),
        r("Wavy_Hair", True, "thing", "curls 0, waves 0"),
        r("Black_Hair", False, "nothead", "hair:black 4"),
        r("Black_Hair", False, "lack", "black hair 2"),
        r("Brown_Hair", False, "nothead", "hair:brown 4"),
        r("Brown_Hair", False, "lack", "brown hair 2"),
        r("Blond_Hair", False, "nothead", "hair:blond 4, hair:blonde 3"),
        r("Blond_Hair", False, "lack", "blond hair 2"),
        r("Blond_Hair", False, "not", "blond 3"),
        r("Gray_Hair", False, "nothead", "hair:gray 3, hair:grey 3"),
        r("Gray_Hair", False, "lack", "gray hair 2, grey hair 2"),
        r("Straight_Hair", False, "nothead", "hair:straight 4"),
        r("Straight_Hair", False, "lack", "straight hair 1"),
        r("Wavy_Hair", False, "nothead", "hair:wavy 4, hair:curly 2"),
        r("Wavy_Hair", False, "lack", "wavy hair 1"),
        r("Bangs", True, "thing", "bangs 12, a fringe 4"),
        r("Bangs", False, "lack", "bangs 5, a fringe 2"),
        r("Bald", True, "adj", "bald 12, bald-headed 2, hairless 0, balding 0"),
        r("Bald", True, "lack", "hair 3"),
        r("Bald", True, "thing", "a bald head 4, shaved head 0, shaven head 0"),
        r("Bald", False, "not", "bald 4"),
        r("Bald", False, "thing", "a full head of hair 2"),
        r("Receding_Hairline", True, "thing", "a receding hairline 12, a receding hair line 0, thinning hair 2"),
        r("Receding_Hairline", False, "lack", "a receding hairline 5"),
        # -- beards ----------------------------------------------------------------------------------------------
        r("No_Beard", False, "thing", "a beard 12, a full beard 1, facial hair 0, beards 0, whiskers 0"),
        r("No_Beard", False, "adj", "bearded 7"),
        r("No_Beard", True, "lack", "a beard 14"),
        r("No_Beard", True, "adj", "beardless 1"),
        r("No_Beard", True, "adj", "clean-shaven 12, smooth-shaven 1, cleanshaven 0, clean-shaved 0", facts=_CLEAN),
        r("No_Beard", True, "thing", "a clean-shaven face 2", facts=_CLEAN),
        r("No_Beard", True, "lack", "facial hair 4", facts=_CLEAN),
        r("Goatee", True, "thing", "a goatee 12, a goatee beard 1, goatees 0"),
        r("Goatee", False, "lack", "a goatee 5"),
        r("Mustache", True, "thing", "a mustache 10, a moustache 6"),
        r("Mustache", True, "adj", "mustached 1, moustached 0, mustachioed 0"),
        r("Mustache", False, "lack", "a mustache 6, a moustache 3"),
        r("Sideburns", True, "thing", "sideburns 12, side whiskers 1, muttonchops 0"),
        r("Sideburns", False, "lack", "sideburns"),
        r("5_o_Clock_Shadow", True, "thing", "a five o'clock shadow 7, a 5 o'clock shadow 5, stubble 7, "
          "light stubble 2, a stubble 0, scruff 0, beard stubble 0"),
        r("5_o_Clock_Shadow", True, "adj", "unshaven 2, stubbly 1, scruffy 0"),
        r("5_o_Clock_Shadow", False, "lack", "stubble 6, a five o'clock shadow 3"),
        # -- what is worn ----------------------------------------------------------------------------------------
        r("Eyeglasses", True, "clothes", "glasses 14, eyeglasses 5, spectacles 2, sunglasses 1, shades 0, eyewear 0, "
          "specs 0, goggles 0"),
        r("Eyeglasses", True, "adj", "bespectacled 1"),
        r("Eyeglasses", False, "bare", "glasses 12, eyeglasses 3, spectacles 1"),
        r("Wearing_Hat", True, "clothes", "a hat 16, a cap 4, a beanie 1, a baseball cap 1, hats 0, a fedora 0, "
          "a beret 0, a helmet 0, a bonnet 0, a cowboy hat 0, a turban 0, headgear 0, a headpiece 0"),
        r("Wearing_Hat", False, "bare", "a hat 12, a cap 2"),
        r("Wearing_Hat", False, "adj", "hatless 1, bareheaded 1, bare-headed 0"),
        r("Wearing_Earrings", True, "worn", "earrings 14, an earring 1"),
        r("Wearing_Earrings", False, "bare", "earrings"),
        r("Wearing_Necklace", True, "worn", "a necklace 14, necklaces 0, a pendant 1, pearls 0"),
        r("Wearing_Necklace", False, "bare", "a necklace"),
        r("Wearing_Necktie", True, "clothes", "a tie 10, a necktie 7, a suit and tie 3, a suit 2, a tuxedo 1, "
          "a bow tie 0, a bowtie 0, tux 0, ties 0, suits 0"),
        r("Wearing_Necktie", False, "bare", "a tie 6, a necktie 4"),
        r("Wearing_Lipstick", True, "worn", "lipstick 14"),
        r("Wearing_Lipstick", True, "head", "lips:painted 2"),
        r("Wearing_Lipstick", False, "bare", "lipstick"),
        r("Heavy_Makeup", True, "worn", "heavy makeup 10, heavy make-up 3, makeup 8, make-up 3, a lot of makeup 1, "
          "mascara 0, eyeliner 0, eyeshadow 0, cosmetics 0"),
        r("Heavy_Makeup", True, "adj", "heavily made-up 1"),
        r("Heavy_Makeup", False, "bare", "makeup 8, make-up 3, heavy makeup 3"),
        r("Heavy_Makeup", False, "adj", "makeup-free 1"),
        r("Heavy_Makeup", False, "thing", "light makeup 0, natural makeup 0, bare face 0"),
        # -- the photograph --------------------------------------------------------------------------------------
        r("Blurry", True, "frame", "blurry 10, blurred 5, fuzzy 1, out-of-focus 2"),
        r("Blurry", True, "head", "photo:blurry 0, photo:blurred 0, photo:fuzzy 0, photo:unfocused 0, photo:grainy 0"),
        r("Blurry", True, "adj", "blurry 0, blurred 0, fuzzy 0, out of focus 0, unfocused 0, pixelated 0"),
        r("Blurry", True, "post", "out of focus 2"),
        r("Blurry", False, "frame", "sharp 6, clear 6, crisp 1"),
        r("Blurry", False, "head", "photo:sharp 0, photo:clear 0, photo:crisp 0, photo:focused 0, photo:detailed 0"),
        r("Blurry", False, "post", "in sharp focus 1, in focus 2"),
        r("Blurry", False, "adj", "in focus 0, in sharp focus 0, sharp focus 0"),
    ]
    return tuple(saying for row in rows for saying in row)


SAYINGS: tuple[Saying, ...] = _sayings()

# What a phrase claims when it is denied, where that is not simply the opposite of its chief claim.
DENIED: dict[str, tuple[tuple[str, bool], ...]] = {"facial hair": tuple(_CLEAN.items())}

# Attributes that cannot be said of one person at once, whatever the labels say.
HAIR_COLOURS: tuple[str, ...] = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")
HAIR_ON_HEAD: tuple[str, ...] = (*HAIR_COLOURS, "Straight_Hair", "Wavy_Hair", "Bangs")

_EXCLUSIVE_GROUPS = ((HAIR_COLOURS, HAIR_COLOURS), (("Bald",), HAIR_ON_HEAD), (("Straight_Hair",), ("Wavy_Hair",)))
EXCLUSIVE: tuple[tuple[tuple[str, bool], tuple[str, bool]], ...] = tuple(
    ((one, True), (other, True)) for left, right in _EXCLUSIVE_GROUPS for one in left for other in right
    if one != other and not (left is right and left.index(one) > left.index(other))
) + ((("No_Beard", True), ("Goatee", True)),)

# How often a caption mentions what is *not* there, as (man, woman): nobody writes "a woman without a goatee".
ABSENCES: dict[str, tuple[float, float]] = {
    "5_o_Clock_Shadow": (.06, .002), "Arched_Eyebrows": (.04, .08), "Attractive": (.08, .08),
    "Bags_Under_Eyes": (.08, .08), "Bald": (.08, .01), "Bangs": (.05, .15), "Big_Lips": (.10, .10),
    "Big_Nose": (.10, .12), "Black_Hair": (.05, .05), "Blond_Hair": (.05, .05), "Blurry": (.10, .10),
    "Brown_Hair": (.05, .05), "Bushy_Eyebrows": (.08, .08), "Chubby": (.10, .10), "Double_Chin": (.08, .05),
    "Eyeglasses": (.30, .20), "Goatee": (.12, .002), "Gray_Hair": (.05, .04), "Heavy_Makeup": (.01, .35),
    "High_Cheekbones": (.08, .10), "Mouth_Slightly_Open": (.30, .30), "Mustache": (.18, .002),
    "Narrow_Eyes": (.10, .10), "No_Beard": (.60, .004), "Oval_Face": (.08, .10), "Pale_Skin": (.04, .04),
    "Pointy_Nose": (.08, .08), "Receding_Hairline": (.10, .02), "Rosy_Cheeks": (.02, .06), "Sideburns": (.10, .002),
    "Smiling": (.60, .60), "Straight_Hair": (.05, .08), "Wavy_Hair": (.05, .08), "Wearing_Earrings": (.02, .20),
    "Wearing_Hat": (.20, .15), "Wearing_Lipstick": (.01, .30), "Wearing_Necklace": (.02, .15),
    "Wearing_Necktie": (.20, .01),
}

# What people put into a short prompt first; everything else counts 1.
SALIENCE: dict[str, float] = {
    "Smiling": 4, "Young": 4, "Eyeglasses": 4, "Bald": 4, "Black_Hair": 3, "Blond_Hair": 4, "Brown_Hair": 3,
    "Gray_Hair": 4, "Wavy_Hair": 2, "Straight_Hair": 2, "No_Beard": 3, "Mustache": 3, "Goatee": 3, "Wearing_Hat": 4,
    "Attractive": 2, "Bangs": 2, "Wearing_Necktie": 2, "Chubby": 2, "Blurry": 1.5, "Heavy_Makeup": 1.5,
    "Wearing_Lipstick": 1.5, "Oval_Face": .5, "High_Cheekbones": .5, "Pointy_Nose": .6, "Arched_Eyebrows": .6,
    "Bags_Under_Eyes": .7, "Narrow_Eyes": .7,
}

# Words that claim nothing about any attribute.
PEOPLE = "person 14, face 5, celebrity 1, individual 1, human 1"
FRAME_MODIFIERS = "professional 2, studio 1, close-up 2, profile 1, colour 1, color 1"
FRAME_NOUNS = HEADS["photo"].names

# Share of the training images with each attribute, as (men, women), measured on 50,903 of them.
# Only `vocabulary` asks: how often a word is written depends on how often its attribute is there.
RATES: dict[str, tuple[float, float]] = {
    "5_o_Clock_Shadow": (.27, .001), "Arched_Eyebrows": (.05, .44), "Attractive": (.28, .69),
    "Bags_Under_Eyes": (.36, .11), "Bald": (.05, .001), "Bangs": (.08, .20), "Big_Lips": (.17, .32),
    "Big_Nose": (.42, .11), "Black_Hair": (.31, .20), "Blond_Hair": (.02, .24), "Blurry": (.06, .04),
    "Brown_Hair": (.15, .24), "Bushy_Eyebrows": (.25, .07), "Chubby": (.12, .01), "Double_Chin": (.10, .01),
    "Eyeglasses": (.12, .02), "Goatee": (.15, .001), "Gray_Hair": (.08, .01), "Heavy_Makeup": (.001, .67),
    "High_Cheekbones": (.30, .57), "Mouth_Slightly_Open": (.42, .53), "Mustache": (.10, .001),
    "Narrow_Eyes": (.12, .12), "No_Beard": (.60, .999), "Oval_Face": (.22, .32), "Pale_Skin": (.03, .06),
    "Pointy_Nose": (.16, .37), "Receding_Hairline": (.12, .05), "Rosy_Cheeks": (.001, .12), "Sideburns": (.14, .001),
    "Smiling": (.40, .55), "Straight_Hair": (.25, .18), "Wavy_Hair": (.15, .46), "Wearing_Earrings": (.02, .32),
    "Wearing_Hat": (.07, .02), "Wearing_Lipstick": (.01, .82), "Wearing_Necklace": (.02, .21),
    "Wearing_Necktie": (.18, .001), "Young": (.64, .87),
}
SHARE_OF_MEN = 0.405

"""The words of the writing tasks. All nouns are singular, countable, and take "an" exactly before a vowel letter."""

from __future__ import annotations

EVERYDAY: dict[str, tuple[str, ...]] = {
    "kitchen": ("spoon", "plate", "cup", "bowl", "oven", "kettle", "pan", "fork", "jug", "apron"),
    "garden": ("tree", "hedge", "rose", "shovel", "fence", "bush", "flower", "pond", "rake", "acorn"),
    "street": ("car", "bus", "lamp", "sign", "bench", "bike", "bridge", "shop", "taxi", "alley"),
    "animals": ("dog", "cat", "horse", "goat", "duck", "fox", "rabbit", "owl", "mouse", "eagle"),
    "office": ("desk", "pen", "folder", "phone", "chair", "printer", "stapler", "envelope", "clock", "letter"),
    "clothes": ("coat", "hat", "scarf", "glove", "shirt", "belt", "boot", "button", "sock", "anorak"),
}

RARE: dict[str, tuple[str, ...]] = {
    "navigation": ("sextant", "astrolabe", "capstan", "keel", "buoy", "rudder"),
    "music": ("oboe", "zither", "bassoon", "theorbo", "clavichord", "ocarina"),
    "geology": ("geode", "moraine", "isthmus", "stalactite", "fjord", "esker"),
    "architecture": ("gargoyle", "buttress", "cupola", "architrave", "portico", "obelisk"),
    "anatomy": ("femur", "tibia", "aorta", "scapula", "clavicle", "incisor"),
    "astronomy": ("quasar", "pulsar", "nebula", "asteroid", "comet", "gnomon"),
}

# Third person singular and plural.
VERBS = {"touches": "touch", "covers": "cover", "carries": "carry", "faces": "face", "holds": "hold", "needs": "need"}
PREPOSITIONS = ("near", "behind", "under", "above", "beside", "with")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ACTIVITIES = (
    "play chess", "have lunch", "study maths", "drink tea", "watch a film", "repair a bike", "paint a wall", "sing",
)  # fmt: skip
PLACES = ("library", "station", "museum", "park", "school", "market", "harbour", "theatre", "bakery", "pool")

# Verbs of one meaning, each with its past participle.
SYNONYMS = (
    (("buys", "bought"), ("purchases", "purchased")),
    (("fixes", "fixed"), ("repairs", "repaired")),
    (("shows", "shown"), ("presents", "presented")),
    (("builds", "built"), ("constructs", "constructed")),
    (("finds", "found"), ("discovers", "discovered")),
    (("picks", "picked"), ("chooses", "chosen")),
    (("hides", "hidden"), ("conceals", "concealed")),
    (("gets", "got"), ("receives", "received")),
)

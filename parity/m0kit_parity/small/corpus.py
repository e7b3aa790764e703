"""Texts to train and evaluate the small checkpoint on: facts in six languages, and short functions in code.

Owns the lexicon, the sentence and code templates, the grading of candidates and the split. Knows nothing
of tokens, images or models; everything is drawn from the `random.Random` it is given.

    group = text_group(random.Random(7), level=4, candidates=10, held_out=True)

A fact is (adjective, noun, place): "the lamp in the garden is red". **The split is over compositions**: one
triple in six and, apart from that, one (adjective, noun) pair in six never stands in anything drawn with
held_out=False; every fact of a held-out group is such a fact. Words and templates are shared, so what is
tested is reading a new combination, not new words. For code a composition is (filter, map, reduce), one in five.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

LANGUAGES: Final = ("en", "de", "es", "ru", "el", "zh")
CODE_LANGUAGES: Final = ("python", "javascript", "go", "rust")
FULL_MATCH: Final = 3  # grade of a document that has everything the query asks for
NEAR_MATCH: Final = 1  # grade of one that has all but one
MAX_LEVEL: Final = 4

Fact = tuple[int, int, int]  # adjective, noun, place: rows of the tables below
Slot = Literal[0, 1, 2]

# One row a concept, one column a language. German and Spanish and Greek nouns carry their article: adjectives
# agree with it.
_ADJECTIVES: Final = """
red|rot|rojo|красный|κόκκινος|红色
green|grün|verde|зелёный|πράσινος|绿色
black|schwarz|negro|чёрный|μαύρος|黑色
white|weiß|blanco|белый|άσπρος|白色
yellow|gelb|amarillo|жёлтый|κίτρινος|黄色
big|groß|grande|большой|μεγάλος|很大
small|klein|pequeño|маленький|μικρός|很小
warm|warm|caliente|тёплый|ζεστός|温暖
cheap|billig|barato|дешёвый|φτηνός|便宜
broken|kaputt|roto|сломанный|σπασμένος|破损
dirty|schmutzig|sucio|грязный|λερωμένος|很脏
full|voll|lleno|полный|γεμάτος|装满
lost|verloren|perdido|потерянный|χαμένος|丢失
round|rund|redondo|круглый|στρογγυλός|圆形
"""
_NOUNS: Final = """
boat|das Boot|el barco|лодка|η βάρκα|小船
car|das Auto|el coche|машина|το αυτοκίνητο|汽车
house|das Haus|la casa|дом|το σπίτι|房子
table|der Tisch|la mesa|стол|το τραπέζι|桌子
chair|der Stuhl|la silla|стул|η καρέκλα|椅子
book|das Buch|el libro|книга|το βιβλίο|书本
lamp|die Lampe|la lámpara|лампа|η λάμπα|台灯
clock|die Uhr|el reloj|будильник|το ρολόι|时钟
key|der Schlüssel|la llave|ключ|το κλειδί|钥匙
bag|die Tasche|la bolsa|сумка|η τσάντα|袋子
hat|der Hut|el sombrero|шляпа|το καπέλο|帽子
shoe|der Schuh|el zapato|ботинок|το παπούτσι|鞋子
coat|der Mantel|el abrigo|куртка|το παλτό|大衣
cup|die Tasse|la taza|чашка|το φλιτζάνι|杯子
plate|der Teller|el plato|тарелка|το πιάτο|盘子
knife|das Messer|el cuchillo|нож|το μαχαίρι|刀子
spoon|der Löffel|la cuchara|ложка|το κουτάλι|勺子
bottle|die Flasche|la botella|бутылка|το μπουκάλι|瓶子
box|die Kiste|la caja|ящик|το κουτί|盒子
door|die Tür|la puerta|калитка|η πόρτα|大门
window|das Fenster|la ventana|окно|το παράθυρο|窗户
ball|der Ball|la pelota|мяч|η μπάλα|皮球
drum|die Trommel|el tambor|барабан|το τύμπανο|大鼓
guitar|die Gitarre|la guitarra|гитара|η κιθάρα|吉他
horse|das Pferd|el caballo|лошадка|το άλογο|马匹
dog|der Hund|el perro|собака|ο σκύλος|小狗
cat|die Katze|el gato|кошка|η γάτα|小猫
bird|der Vogel|el pájaro|птица|το πουλί|小鸟
apple|der Apfel|la manzana|яблоко|το μήλο|苹果
bread|das Brot|el pan|хлеб|το ψωμί|面包
ring|der Ring|el anillo|кольцо|το δαχτυλίδι|戒指
letter|der Brief|la carta|письмо|το γράμμα|信件
"""
_PLACES: Final = """
harbour|im Hafen|en el puerto|в порту|στο λιμάνι|港口
school|in der Schule|en la escuela|в школе|στο σχολείο|学校
garden|im Garten|en el jardín|в саду|στον κήπο|花园
market|auf dem Markt|en el mercado|на рынке|στην αγορά|市场
station|am Bahnhof|en la estación|на вокзале|στον σταθμό|车站
church|in der Kirche|en la iglesia|в церкви|στην εκκλησία|教堂
kitchen|in der Küche|en la cocina|на кухне|στην κουζίνα|厨房
museum|im Museum|en el museo|в музее|στο μουσείο|博物馆
forest|im Wald|en el bosque|в лесу|στο δάσος|森林
hotel|im Hotel|en el hotel|в отеле|στο ξενοδοχείο|酒店
park|im Park|en el parque|в парке|στο πάρκο|公园
cellar|im Keller|en el sótano|в подвале|στο υπόγειο|地下室
"""


def _table(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(line.split("|")) for line in text.strip().splitlines())


ADJECTIVES: Final = _table(_ADJECTIVES)
NOUNS: Final = _table(_NOUNS)
PLACES: Final = _table(_PLACES)

STATEMENTS: Final[dict[str, tuple[str, ...]]] = {
    "en": ("The {n} in the {p} is {a}.", "There is a {a} {n} in the {p}.", "In the {p} you find a {a} {n}."),
    "de": ("Hier ist {n} {p} {a}.", "Auch {p} gibt es etwas: {n}, {a}.", "Ganz {a} ist {n} {p}."),
    "es": ("Aquí {n} {p} está {a}.", "También {p} hay algo: {n}, {a}.", "Dicen que {n} está {a} {p}."),
    "ru": ("Вот {n} {p}, {a}.", "Там {p} есть {a} {n}.", "Говорят, {a} {n} стоит {p}."),
    "el": ("Εδώ {n} {p} είναι {a}.", "Λένε ότι {p} {n} είναι {a}.", "Υπάρχει {p} κάτι: {n}, {a}."),
    "zh": ("这里 {p} 的 {n} 是 {a} 的。", "听说 {p} 有 一个 {a} 的 {n} 。", "一个 {a} 的 {n} 在 {p} 。"),
}
_QUESTIONS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "en": {
        "anp": ("looking for a {a} {n} in the {p}", "find the {a} {n} in the {p}"),
        "an": ("looking for a {a} {n}", "where is the {a} {n}?"),
        "np": ("find the {n} in the {p}", "what about the {n} in the {p}?"),
    },
    "de": {
        "anp": ("ich suche {p}: {n}, {a}", "wo ist {n}, {a}, {p}?"),
        "an": ("ich suche: {n}, {a}", "wo ist {n}, {a}?"),
        "np": ("ich suche {n} {p}", "was ist mit {n} {p}?"),
    },
    "es": {
        "anp": ("busco {p}: {n}, {a}", "dónde está {n}, {a}, {p}?"),
        "an": ("busco: {n}, {a}", "dónde está {n}, {a}?"),
        "np": ("busco {n} {p}", "qué pasa con {n} {p}?"),
    },
    "ru": {
        "anp": ("где {a} {n} {p}?", "нужна вещь: {n}, {a}, {p}"),
        "an": ("где {a} {n}?", "нужна вещь: {n}, {a}"),
        "np": ("где {n} {p}?", "что там: {n} {p}"),
    },
    "el": {
        "anp": ("ψάχνω {p}: {n}, {a}", "πού είναι {n}, {a}, {p}?"),
        "an": ("ψάχνω: {n}, {a}", "πού είναι {n}, {a}?"),
        "np": ("ψάχνω {n} {p}", "τι γίνεται με {n} {p}?"),
    },
    "zh": {
        "anp": ("寻找 {p} 的 {a} 的 {n}", "请问 {a} 的 {n} 在 {p} 吗？"),
        "an": ("寻找 {a} 的 {n}", "请问 {a} 的 {n} 在 哪里？"),
        "np": ("寻找 {p} 的 {n}", "请问 {n} 在 {p} 吗？"),
    },
}
_ASKED: Final[dict[str, tuple[Slot, ...]]] = {"anp": (0, 1, 2), "an": (0, 1), "np": (1, 2)}
_LIST_OPENING: Final = {
    "en": "words", "de": "Wörter", "es": "palabras", "ru": "слова", "el": "λέξεις", "zh": "词语",
}  # fmt: skip
_ASK_WORD: Final = {"en": "find", "de": "suche", "es": "busco", "ru": "где", "el": "ψάχνω", "zh": "寻找"}
# zh last and least: its words come in fewer shapes
_LANGUAGE_WEIGHTS: Final = (5, 3, 3, 3, 3, 2)


@dataclass(frozen=True, slots=True)
class Group:
    """A query with its candidates. relevance[i] is the grade of documents[i]: 3 all asked for, 1 all but one, 0."""

    query: str
    documents: tuple[str, ...]
    relevance: tuple[int, ...]


def is_held_out(fact: Fact) -> bool:
    """Whether a fact belongs to the evaluation: by its triple or by its (adjective, noun) pair."""
    adjective, noun, place = fact
    triple = f"{ADJECTIVES[adjective][0]}/{NOUNS[noun][0]}/{PLACES[place][0]}"
    return pair_is_held_out(adjective, noun) or zlib.crc32(triple.encode()) % 6 == 0


def pair_is_held_out(adjective: int, noun: int) -> bool:
    """Whether this adjective never stands with this noun in training, in any language, in text or on pages."""
    return zlib.crc32(f"{ADJECTIVES[adjective][0]} {NOUNS[noun][0]}".encode()) % 6 == 0


def word(kind: Slot, row: int, language: str, noun: int | None = None) -> str:
    """A concept's word in a language; adjectives agree with the noun given (its row), nouns keep their article."""
    column = LANGUAGES.index(language)
    text = (ADJECTIVES, NOUNS, PLACES)[kind][row][column]
    if kind != 0 or noun is None:
        return text
    return _agree(text, NOUNS[noun][column], language)


def _agree(adjective: str, noun: str, language: str) -> str:
    if language == "es" and adjective.endswith("o") and noun.startswith("la "):
        return adjective[:-1] + "a"
    if language == "ru" and noun[-1] in "ая":
        return adjective[:-2] + "ая"
    if language == "ru" and noun[-1] in "ое":
        return adjective[:-2] + "ое"
    if language == "el" and not noun.startswith("ο "):
        feminine = noun.startswith("η ")
        if adjective.endswith("ός"):
            return adjective[:-2] + ("ή" if feminine else "ό")
        return adjective[:-2] + ("η" if feminine else "ο")
    return adjective


def statement(rng: random.Random, fact: Fact, language: str) -> str:
    """One sentence that states the fact."""
    return fill(rng.choice(STATEMENTS[language]), fact, language)


def fill(template: str, fact: Fact, language: str) -> str:
    """A sentence of a language with the words of a fact."""
    adjective, noun, place = fact
    return template.format(a=word(0, adjective, language, noun), n=word(1, noun, language), p=word(2, place, language))


def draw_fact(rng: random.Random, held_out: bool, **fixed: int) -> Fact:
    """A fact of the wanted split; fixed may hold adjective, noun or place. Gives up a fixed value when the split
    has no such fact."""
    for attempt in range(400):
        keep = fixed if attempt < 300 else {}
        fact = (
            keep.get("adjective", rng.randrange(len(ADJECTIVES))),
            keep.get("noun", rng.randrange(len(NOUNS))),
            keep.get("place", rng.randrange(len(PLACES))),
        )
        if is_held_out(fact) == held_out:
            return fact
    raise RuntimeError("no such fact")


def grade(asked: Sequence[Slot], target: Fact, facts: Sequence[Fact]) -> int:
    """3 if one fact has every asked slot of the target, 1 if the best has all but one of three, otherwise 0.

    For a query of two slots a half match is no match: it would be most candidates.
    """
    best = max(sum(fact[slot] == target[slot] for slot in asked) for fact in facts)
    if best == len(asked):
        return FULL_MATCH
    return NEAR_MATCH if len(asked) == 3 and best == 2 else 0


def text_group(rng: random.Random, level: int, candidates: int, held_out: bool = False, across: bool = False) -> Group:
    """A query and its candidates at a level of difficulty, one to four.

    1: is this word in that list? Lists have no split: nothing is evaluated on them. 2: one sentence, the other
    candidates at random or one slot off. 3: three slots, near misses, candidates in other languages. 4: one to
    three sentences a document, slots scattered over them.
    across: no document is in the query's language. In levels 3 and 4 about every third group has documents in
    several languages, the full match never in the query's own.
    """
    language = rng.choices(LANGUAGES, _LANGUAGE_WEIGHTS)[0]
    if level == 1:
        return _list_group(rng, candidates, language, across)
    target = draw_fact(rng, held_out)
    form = rng.choices(("anp", "an", "np"), (1, 2, 2) if level == 2 else (3, 1, 1))[0]
    asked = _ASKED[form]
    question = fill(rng.choice(_QUESTIONS[language][form]), target, language)
    mixed = level >= 3 and (rng.random() < 0.35 or across)

    def document(facts: list[Fact], own: bool) -> str:
        tongue = rng.choices(LANGUAGES, _LANGUAGE_WEIGHTS)[0] if mixed and not own else language
        if mixed and (own or (across and tongue == language)):
            tongue = rng.choice([other for other in LANGUAGES if other != language])
        return " ".join(statement(rng, fact, tongue) for fact in facts)

    extra = 0 if level < 4 else rng.choice((0, 1, 1, 2))
    fact_lists = [_with_fillers(rng, [target], extra, target, asked, held_out)]
    for _ in range(candidates - 1):
        kind = rng.random()
        if kind < 0.35:
            main = [draw_fact(rng, held_out)]
        elif kind < 0.75 or level < 4:
            main = [_near(rng, target, asked, held_out)]
        else:  # everything asked for is there, but never in one fact
            first = _near(rng, target, asked, held_out)
            second = _near(rng, target, asked, held_out)
            main = [first, second]
        extra = 0 if level < 4 else max(0, rng.choice((0, 1, 1, 2)) - len(main) + 1)
        fact_lists.append(_with_fillers(rng, main, extra, target, asked, held_out))
    documents = [document(facts, own=index == 0) for index, facts in enumerate(fact_lists)]
    return _shuffled(rng, question, documents, [grade(asked, target, facts) for facts in fact_lists])


def _near(rng: random.Random, target: Fact, asked: Sequence[Slot], held_out: bool) -> Fact:
    """A fact with one of the asked slots changed (and those not asked for drawn at random)."""
    changed = rng.choice(list(asked))
    names = ("adjective", "noun", "place")
    fixed = {names[slot]: target[slot] for slot in asked if slot != changed}
    return draw_fact(rng, held_out, **fixed)


def _with_fillers(
    rng: random.Random, main: list[Fact], extra: int, target: Fact, asked: Sequence[Slot], held_out: bool
) -> list[Fact]:
    facts = list(main)
    for _ in range(extra):
        filler = draw_fact(rng, held_out)
        if all(filler[slot] != target[slot] for slot in asked):
            facts.append(filler)
    rng.shuffle(facts)
    return facts


def _list_group(rng: random.Random, candidates: int, language: str, across: bool) -> Group:
    tongue = rng.choice([other for other in LANGUAGES if other != language]) if across else language
    asked, column = LANGUAGES.index(language), LANGUAGES.index(tongue)
    rows = [row for table in (ADJECTIVES, NOUNS, PLACES) for row in table]
    chosen = rng.choice(rows)
    others = [row[column] for row in rows if row[column] != chosen[column]]
    documents = []
    for index in range(candidates):
        items = rng.sample(others, rng.randint(3, 5))
        if index == 0:
            items[rng.randrange(len(items))] = chosen[column]
        documents.append(f"{_LIST_OPENING[tongue]}: {' , '.join(items)}")
    grades = [FULL_MATCH] + [0] * (candidates - 1)
    return _shuffled(rng, f"{_ASK_WORD[language]} {chosen[asked]}", documents, grades)


def _shuffled(rng: random.Random, query: str, documents: Sequence[str], grades: Sequence[int]) -> Group:
    order = list(range(len(documents)))
    rng.shuffle(order)
    return Group(query, tuple(documents[i] for i in order), tuple(grades[i] for i in order))


# Code: a function filters, maps and reduces a list of numbers.

_FILTERS: Final = (
    ("even", {"python": "{x} % 2 == 0", "*": "{x} % 2 == 0"}),
    ("odd", {"*": "{x} % 2 != 0"}),
    ("positive", {"*": "{x} > 0"}),
    ("negative", {"*": "{x} < 0"}),
    ("large", {"*": "{x} > 100"}),
    ("small", {"*": "{x} < 10"}),
)
_MAPS: Final = (
    ("squares", {"*": "{x} * {x}"}),
    ("doubles", {"*": "{x} * 2"}),
    ("halves", {"*": "{x} / 2", "python": "{x} // 2"}),
    ("remainders by ten", {"*": "{x} % 10"}),
    ("successors", {"*": "{x} + 1"}),
    ("absolute values", {"python": "abs({x})", "javascript": "Math.abs({x})", "go": "abs({x})", "rust": "{x}.abs()"}),
)
_REDUCES: Final = (
    ("sum", "0", {"*": "{t} += {v}"}),
    ("product", "1", {"*": "{t} *= {v}"}),
    (
        "maximum", "0",
        {"python": "{t} = max({t}, {v})", "javascript": "{t} = Math.max({t}, {v})", "go": "{t} = max({t}, {v})",
         "rust": "{t} = {t}.max({v})"},
    ),
    (
        "minimum", "9999",
        {"python": "{t} = min({t}, {v})", "javascript": "{t} = Math.min({t}, {v})", "go": "{t} = min({t}, {v})",
         "rust": "{t} = {t}.min({v})"},
    ),
    ("alternating sum", "0", {"*": "{t} = {v} - {t}"}),
)  # fmt: skip
_SHELLS: Final = {
    "python": """def {f}({l}):
    {t} = {init}
    for {x} in {l}:
        if {cond}:
            {step}
    return {t}""",
    "javascript": """function {f}({l}) {{
  let {t} = {init};
  for (const {x} of {l}) {{
    if ({cond}) {step};
  }}
  return {t};
}}""",
    "go": """func {f}({l} []int) int {{
\t{t} := {init}
\tfor _, {x} := range {l} {{
\t\tif {cond} {{
\t\t\t{step}
\t\t}}
\t}}
\treturn {t}
}}""",
    "rust": """fn {f}({l}: &[i64]) -> i64 {{
    let mut {t} = {init};
    for {x} in {l} {{
        if {cond} {{ {step}; }}
    }}
    {t}
}}""",
}
_QUERY_CODE: Final = (
    "the {r} of the {m} of all {f} numbers",
    "return the {r} of {m} of the {f} numbers",
    "take {f} numbers, then the {m}, then the {r}",
)
_NAMES: Final = ("run", "calc", "solve", "work", "apply", "compute", "f", "g", "process", "evaluate")
_ITEMS: Final = ("x", "n", "v", "item", "value", "k")
_LISTS: Final = ("xs", "values", "items", "data", "numbers", "nums")
_TOTALS: Final = ("t", "out", "acc", "result", "total", "r")

Pipeline = tuple[int, int, int]  # filter, map, reduce


def pipeline_is_held_out(pipeline: Pipeline) -> bool:
    """Whether this combination of filter, map and reduce belongs to the evaluation."""
    names = f"{_FILTERS[pipeline[0]][0]}>{_MAPS[pipeline[1]][0]}>{_REDUCES[pipeline[2]][0]}"
    return zlib.crc32(names.encode()) % 5 == 0


def function(rng: random.Random, pipeline: Pipeline, language: str) -> str:
    """A function that computes the pipeline, with names that give nothing away."""
    picked, mapped, reduced = _FILTERS[pipeline[0]], _MAPS[pipeline[1]], _REDUCES[pipeline[2]]
    names = {"x": rng.choice(_ITEMS), "l": rng.choice(_LISTS), "t": rng.choice(_TOTALS), "f": rng.choice(_NAMES)}
    value = mapped[1].get(language, mapped[1].get("*", "")).format(**names)
    step = reduced[2].get(language, reduced[2].get("*", "")).format(**names, v=value)
    condition = picked[1].get(language, picked[1].get("*", "")).format(**names)
    return _SHELLS[language].format(**names, init=reduced[1], cond=condition, step=step)


def code_group(rng: random.Random, candidates: int, held_out: bool = False, named: bool = False) -> Group:
    """A description and functions in four languages: one or two that compute it, near misses, others.

    named: the query names the language wanted, which counts like the other three things asked for; the right
    function in another language is then a near miss.
    """
    target = _draw_pipeline(rng, held_out)
    names = _FILTERS[target[0]][0], _MAPS[target[1]][0], _REDUCES[target[2]][0]
    query = rng.choice(_QUERY_CODE).format(f=names[0], m=names[1], r=names[2])
    pipelines = [target]
    for _ in range(candidates - 1):
        if rng.random() < 0.45:
            pipelines.append(_draw_pipeline(rng, held_out))
            continue
        changed = rng.randrange(3)
        near = list(target)
        for _ in range(50):
            near[changed] = rng.randrange(len((_FILTERS, _MAPS, _REDUCES)[changed]))
            if pipeline_is_held_out((near[0], near[1], near[2])) == held_out and near[changed] != target[changed]:
                break
        else:
            near = list(_draw_pipeline(rng, held_out))
        pipelines.append((near[0], near[1], near[2]))
    if not named:
        documents = [function(rng, pipeline, rng.choice(CODE_LANGUAGES)) for pipeline in pipelines]
        return _shuffled(rng, query, documents, [grade((0, 1, 2), target, [pipeline]) for pipeline in pipelines])
    wanted = rng.choice(CODE_LANGUAGES)
    documents, grades = [], []
    for index, pipeline in enumerate(pipelines):
        if index and rng.random() < 0.4:
            pipeline = target
        language = wanted if index == 0 else rng.choice(CODE_LANGUAGES)
        same = sum(a == b for a, b in zip(pipeline, target, strict=True)) + (language == wanted)
        documents.append(function(rng, pipeline, language))
        grades.append({4: FULL_MATCH, 3: NEAR_MATCH}.get(same, 0))
    return _shuffled(rng, f"{query} in {wanted}", documents, grades)


def _draw_pipeline(rng: random.Random, held_out: bool) -> Pipeline:
    while True:
        pipeline = (rng.randrange(len(_FILTERS)), rng.randrange(len(_MAPS)), rng.randrange(len(_REDUCES)))
        if pipeline_is_held_out(pipeline) == held_out:
            return pipeline

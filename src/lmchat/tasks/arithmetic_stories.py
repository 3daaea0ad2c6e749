"""The stories that arithmetic word problems are made of.

A story is about one quantity: it begins with a number or with a first calculation, each step changes the quantity, and
a question asks for it. Sentences are patterns: ``[a|b]`` stands for one of its alternatives (see `patterns`).
Placeholders: ``{who}`` the person, ``{prev}`` the person before (in a relay), ``{items}`` what is counted, ``{a}`` the
first number, ``{n}`` the number of a step. In a sentence that begins with ``{who}`` the person may be called he or she,
or be left out after an "and"; any other sentence begins with a placeholder or with a word that may be written small.
Only the number of a step may be "them": a step that is about the whole quantity names the items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Operation = Literal["+", "-", "*", "/", "total"]

WORKING: dict[Operation, str] = {
    "+": "Adding gives",
    "-": "Taking away leaves",
    "*": "Multiplying gives",
    "/": "Dividing gives",
}
"""The solution's words before a result, where neither step nor family has its own."""


@dataclass(frozen=True)
class Step:
    """One calculation: what happens in the story, and how the solution words it.

    Args:
        op: what happens to the quantity; ``total`` adds up the quantities of all persons of a relay.
        story: the sentence that tells it; empty: the question alone asks for it.
        operand: the number where the story has a word for it, such as "twice".
        question: asks for the result of this step, which then is the last one; empty: the family asks.
        working: the solution's words before the result; empty: as the family has it.
        result: the solution's words for the result ``{r}``; empty: as the family has it.
    """

    op: Operation
    story: str
    operand: int | None = None
    question: str = ""
    working: str = ""
    result: str = ""


@dataclass(frozen=True)
class Family:
    """Stories of one kind, any of whose steps can follow each other.

    Args:
        items: what may be counted, in the plural.
        openings: sentences that give the first number.
        starts: steps that may begin the story instead, with both their numbers.
        steps: what may happen.
        questions: ask for the quantity in the end.
        remaining: ask for what is left, of stories in which something is taken away.
        result: the solution's words for a result ``{r}``.
        working: the solution's words before a result; empty: those of `WORKING`.
        relay: every step is about another person than the one before.
    """

    items: tuple[str, ...]
    openings: tuple[str, ...]
    starts: tuple[Step, ...]
    steps: tuple[Step, ...]
    questions: tuple[str, ...]
    remaining: tuple[str, ...] = ()
    result: str = "{r} {items}"
    working: str = ""
    relay: bool = False


THINGS = Family(
    items=(
        "apples",
        "oranges",
        "eggs",
        "books",
        "candies",
        "flowers",
        "bottles",
        "balls",
        "pears",
        "keys",
        "lemons",
        "spoons",
    ),
    openings=(
        "There are {a} {items}[| here| there| in a box| on a table][| at first].",
        "{who} [has|finds|has got|had|buys] {a} {items}.",
        "{a} {items} are [there|here|in a box|on a table][| at first| in the morning].",
    ),
    starts=(
        Step("*", "There are {n} [rows|boxes|bags] of {a} {items}."),
        Step("*", "There are {a} [rows|boxes|bags] with {n} {items} [each|in each of them]."),
        Step("*", "{who} [has|buys|gets|takes|brings] {n} [boxes|bags|packs|baskets] [of|with] {a} {items}[| each]."),
        Step("*", "{who} has {a} [rows|boxes|bags] [of|with] {n} {items}[| each]."),
        Step("*", "A box holds {a} {items}. {who} [has|buys] {n} [|such ]boxes."),
        Step("*", "Each of {n} [boxes|bags|shelves] holds {a} {items}."),
        Step("+", "{who} has {a} {items} in one box and {n} [|{items} ]in another."),
        Step("+", "On [Monday|Sunday] {who} [buys|finds] {a} {items}, and {n} more the next day."),
    ),
    steps=(
        Step("+", "{n} more[| {items}] are [brought|added|found]."),
        Step("+", "{who} [gets|brings|adds|buys|finds|got|bought|found] {n} [more|more {items}|others]."),
        Step("-", "{n} [|of them |{items} ]are [taken away|lost|sold|broken]."),
        Step("-", "{who} [takes away|removes|uses|loses|gives away|sells|used|lost|sold] {n}[| {items}| of them]."),
        Step("-", "{n} [|of them |of the {items} ]are [broken|bad|old|too small] and put away."),
        Step("/", "Half of the {items} are [taken away|lost|sold].", operand=2),
        Step("*", "Later there are {n} times as many[| {items}]."),
        Step(
            "/",
            "[All|All the] {items} are [shared equally by|divided equally among] {n} people.",
            question="How many {items} does each [one|person|of them] get?",
        ),
        Step(
            "/",
            "{who} puts [all|all the|the] {items} into {n} boxes, the same number in each.",
            question="How many {items} are in each box?",
        ),
        Step(
            "*",
            "Each of the {items} costs ${n}.",
            question="How [many dollars|much] do [all|the] {items} cost?",
            result="${r}",
        ),
    ),
    questions=("How many {items} are [there|there now|there in the end|there in total]?",),
    remaining=("How many {items} are left?", "How many are left?"),
)

VISITORS = Family(
    items=("birds", "ducks", "fish", "cars", "horses", "cats", "people", "sheep", "boats", "guests"),
    openings=(
        "There are {a} {items}[| here| in one place][| at first].",
        "{who} [sees|counts] {a} {items}.",
        "{a} {items} are [there|here|in one place][| at first| in the morning].",
    ),
    starts=(
        Step("*", "There are {n} [groups|lines|rows] of {a} {items}."),
        Step("*", "There are {a} groups with {n} {items} in each[| of them]."),
        Step("+", "There are {a} {items} on the left and {n} [|{items} ]on the right."),
        Step("+", "{a} {items} come in the morning and {n} [|{items} |more ]in the afternoon."),
    ),
    steps=(
        Step("+", "{n} more[| {items}] [come|arrive|join them]."),
        Step("+", "[Later|Then|After an hour] {n} [more|more {items}|others|{items}] [come|arrive]."),
        Step("-", "{n} [|of them |{items} |of the {items} ][go away|leave|disappear]."),
        Step("-", "[Later|Then|After an hour] {n} [|of them |{items} ][go away|leave|disappear]."),
        Step("/", "Half of the {items} [go away|leave].", operand=2),
        Step("*", "Later there are {n} times as many[| {items}]."),
        Step("/", "The {items} [form|make] {n} equal groups.", question="How many {items} are in each group?"),
    ),
    questions=("How many {items} are [there|there now|there in the end|there in total]?",),
    remaining=("How many {items} are [left|still there]?", "How many are left?"),
)

COLLECTION = Family(
    items=("marbles", "stickers", "stamps", "coins", "shells", "cards", "buttons", "beads", "badges", "pebbles"),
    openings=(
        "{who} [has|had|owns|starts with|has collected] {a} {items}.",
        "{who} collects {items} and has {a}[| of them].",
    ),
    starts=(
        Step("*", "{who} has {n} [bags|boxes|packs] [of {a} {items}|with {a} {items} each|with {a} {items} in each]."),
        Step("*", "{who} fills {n} pages of an album with {a} {items} on each page."),
        Step("+", "{who} has {a} [red|big|old] {items} and {n} [blue|small|new] [ones|{items}]."),
        Step(
            "+",
            "After [giving away|losing|selling] {n}[| {items}], {who} has {a} {items} left.",
            question="How many {items} did {who} have [at first|in the beginning|before]?",
        ),
        Step(
            "-",
            "After [finding|getting|buying] {n} {items}, {who} has {a}[| {items}].",
            question="How many {items} did {who} have [at first|before]?",
        ),
    ),
    steps=(
        Step("+", "{who} [finds|gets|buys|collects|found|got|bought] {n} [more|more {items}|{items}|new ones]."),
        Step("+", "{who} gets {n}[| more| {items}| more {items}] from a [friend|brother|sister|cousin]."),
        Step("+", "{who} wins {n}[| {items}| more] in a game."),
        Step("-", "{who} [gives|gave] {n}[| {items}| of them] [to a friend|away|to a sister]."),
        Step("-", "{who} [loses|sells|breaks|lost|sold|broke] {n}[| {items}| of them]."),
        Step("-", "{who} trades away {n}[| {items}]."),
        Step("*", "A year later {who} has {n} times as many[| {items}]."),
        Step("*", "{who} doubles the [collection|number].", operand=2),
        Step("/", "{who} makes {n} equal piles of the {items} and keeps one[| pile]."),
        Step("/", "{who} [gives|sells] half of the {items} to a [cousin|friend].", operand=2),
        Step(
            "/",
            "{who} puts [all|all the|the] {items} into {n} boxes, the same number in each.",
            question="How many {items} are in each box?",
        ),
        Step(
            "*",
            "Each of the {items} is worth ${n}.",
            question="How many dollars are the {items} worth together?",
            result="${r}",
        ),
    ),
    questions=("How many {items} does {who} have [now|in the end|then]?", "How many {items} does {who} have?"),
    remaining=("How many {items} does {who} have left?", "How many {items} are left?"),
)

SHOPPING = Family(
    items=("pens", "notebooks", "mugs", "shirts", "towels", "candles", "toys", "plates", "hats", "lamps"),
    openings=(
        "{who} [has|puts] {items} worth ${a} in the basket.",
        "{who} [picks|buys|chooses|takes] {items} for ${a}.",
        "The {items} that {who} wants cost ${a}.",
    ),
    starts=(
        Step("*", "{who} [buys|takes|orders] {n} {items} for ${a} each."),
        Step("*", "In a shop {items} cost ${a} [apiece|each], and {who} [takes|buys] {n}[| of them]."),
        Step("*", "{items} cost ${n} each. {who} buys {a}[| of them]."),
        Step("+", "{who} buys {items} for ${a} and a bag for ${n}."),
    ),
    steps=(
        Step("+", "{who} also [buys|takes] a [book|ball|bag|cake] for ${n}."),
        Step("+", "Wrapping costs ${n}[| more]."),
        Step("+", "Delivery [adds ${n} to the bill|costs ${n}|costs another ${n}]."),
        Step("-", "A coupon takes ${n} off[| the bill]."),
        Step("-", "{who} [gets|has] a discount of ${n}."),
        Step("*", "{who} orders the same for {n} schools, one order for each."),
        Step("/", "{who} [has to pay|pays] only half of [that|the bill].", operand=2),
        Step(
            "/",
            "{n} friends share the bill equally.",
            question="How [many dollars|much] does each friend pay?",
        ),
    ),
    questions=(
        "How [many dollars|much] does it cost?",
        "How much does {who} [have to pay|pay][|, in dollars]?",
        "What is the bill in dollars?",
    ),
    result="${r}",
)

BAKERY = Family(
    items=("cookies", "muffins", "rolls", "pies", "cupcakes", "tarts", "bagels", "waffles"),
    openings=("{who} [bakes|makes|has baked] {a} {items}.", "There are {a} {items} in {who}'s [bakery|kitchen]."),
    starts=(
        Step("*", "{who} [bakes|makes] {n} trays of {items} with {a} on each[| tray]."),
        Step("*", "{who} [bakes|makes|has] {n} [boxes|bags|trays] of {a} {items}[| each]."),
        Step("+", "{who} bakes {a} {items} in the morning and {n} in the [afternoon|evening]."),
    ),
    steps=(
        Step("+", "{who} [bakes|makes|baked|made] [another {n}|{n} more][| {items}]."),
        Step("+", "A helper brings {n} [fresh {items}|more]."),
        Step("-", "{who} [sells|sold] {n}[| {items}| of them]."),
        Step("-", "The children [eat|ate] {n}[| {items}| of them]."),
        Step("-", "{n} [|{items} |of them ]get burnt and are thrown away."),
        Step("*", "For a party {who} needs {n} times that number and bakes the rest."),
        Step("/", "{who} [gives away|sells] half of the {items}.", operand=2),
        Step(
            "/",
            "{who} [packs|puts] [all|all the|the] {items} in {n} equal [boxes|bags].",
            question="How many {items} are in [one of them|each]?",
        ),
        Step(
            "*",
            "Each of the {items} sells for ${n}.",
            question="How many dollars do the {items} bring in?",
            result="${r}",
        ),
    ),
    questions=("How many {items} are [there in the end|there now|there]?",),
    remaining=("How many {items} are left?",),
)

BUS = Family(
    items=("passengers", "people", "tourists", "students", "travelers"),
    openings=(
        "A [bus|train] leaves the station with {a} {items}.",
        "There are {a} {items} on {who}'s [bus|train].",
        "A [bus|train|boat] [carries|has] {a} {items}.",
    ),
    starts=(
        Step("+", "{a} {items} sit and {n} [|{items} ]stand on {who}'s bus."),
        Step("*", "{who} drives a train of {n} cars with {a} {items} in each car."),
    ),
    steps=(
        Step("+", "At the [next stop|station|market] {n} [|{items} |more ]get on."),
        Step("+", "{n} [|{items} |more ][climb aboard|get on] at the market."),
        Step("-", "At the [next stop|station|bridge] {n} [|{items} |of them ]get off."),
        Step("-", "{n} [|{items} |of them ][leave|get off] at the school."),
        Step("/", "At the [bridge|school] half of the {items} get off.", operand=2),
        Step("*", "At the stadium the number of {items} on board grows to {n} times as many."),
        Step(
            "*",
            "[Every one|Each] of the {items} on board pays ${n}.",
            question="How [many dollars|much] do they pay?",
            result="${r}",
        ),
        Step(
            "/",
            "At the last stop the {items} form {n} equal groups.",
            question="How many {items} are in each group?",
        ),
    ),
    questions=("How many {items} are [on board now|on board in the end|on board]?",),
    remaining=("How many {items} are [left|still on board]?",),
)

READING = Family(
    items=("pages",),
    openings=(
        "{who} has a book of {a} {items} to read.",
        "{who} [must read|has to read] {a} {items}[| for school].",
    ),
    starts=(
        Step("*", "{who} has {n} chapters to read with {a} {items} in each."),
        Step("+", "{who} has two stories to read, one of {a} {items} and one of {n}[| {items}]."),
    ),
    steps=(
        Step("-", "{who} reads {n}[| {items}| of them] on [Monday|Sunday]."),
        Step("-", "{who} reads {n}[| {items}| of them] before bed."),
        Step("-", "The teacher lets {who} skip {n}[| {items}| of them]."),
        Step("+", "The teacher adds {n} [{items}|more] to the reading."),
        Step("+", "{who} must also read a letter of {n} {items}."),
        Step("/", "Over the weekend {who} reads half of what is left.", operand=2),
        Step("*", "Then the reading list becomes {n} times as long."),
        Step(
            "/",
            "{who} reads the rest in {n} days, the same number of {items} each day.",
            question="How many {items} does {who} read each day?",
        ),
    ),
    questions=("How many {items} are left[| to read]?", "How many {items} does {who} still have to read?"),
)

GARDEN = Family(
    items=("tulips", "carrots", "cabbages", "bushes", "beans", "roses", "pumpkins", "lilies", "onions"),
    openings=(
        "{who} [grows|has planted|plants] {a} {items}.",
        "There are {a} {items} in {who}'s garden.",
        "A garden has {a} {items}.",
    ),
    starts=(
        Step("*", "{who} plants {n} rows of {items} with {a} in each[| row]."),
        Step("*", "{who} has {n} [garden beds|fields], each with {a} {items}."),
        Step(
            "*",
            "A [garden|farmer|field] has {a} rows [of {n} {items}|with {n} {items} each|with {n} {items} in each row].",
        ),
        Step("+", "{who} plants {a} {items} in spring and {n} [|more ]in summer."),
    ),
    steps=(
        Step("+", "{who} plants {n} more[| {items}]."),
        Step("+", "A neighbor plants {n} [{items}|more] there too."),
        Step("-", "Rabbits [eat|ate] {n}[| {items}| of them]."),
        Step("-", "{who} [picks|sells|cuts|picked|sold] {n}[| {items}| of them]."),
        Step("-", "Frost kills {n}[| {items}| of them]."),
        Step("*", "The next year {who} grows {n} times as many[| {items}]."),
        Step("/", "A storm destroys half of the {items}.", operand=2),
        Step(
            "/",
            "{who} ties [all|all the|the] {items} into {n} equal bundles.",
            question="How many {items} are in each bundle?",
        ),
    ),
    questions=("How many {items} are [in the garden now|in the garden|there now]?",),
    remaining=("How many {items} are left?",),
)

SAVINGS = Family(
    items=("dollars",),
    openings=(
        "{who} has ${a}[| in the bank].",
        "{who} [saved|has saved|has] {a} dollars.",
        "There are ${a} in {who}'s purse.",
    ),
    starts=(
        Step("*", "{who} saves ${a} [a|every|each] week for {n} weeks."),
        Step("*", "{who} works {n} hours for ${a} an hour."),
        Step("*", "{who} earns ${a} an hour and works {n} hours."),
        Step("+", "{who} gets ${a} from an aunt and ${n} from an uncle."),
    ),
    steps=(
        Step("+", "{who} [earns|earned] [${n}|{n} dollars|another ${n}] by washing cars."),
        Step("+", "{who} gets ${n}[| more] from a [neighbor|friend|brother|sister]."),
        Step("-", "{who} [spends|spent] [${n}|{n} dollars] on [lunch|food|a book|a toy]."),
        Step("-", "{who} [pays ${n} for a ticket|buys a ticket for ${n}]."),
        Step("-", "{who} [lends|gives] ${n} to a friend."),
        Step("*", "A year later the money has become {n} times as much."),
        Step("/", "{who} gives half of the money to charity.", operand=2),
        Step("/", "{who} puts the money in {n} equal parts and keeps one part."),
        Step(
            "/",
            "{who} spends all of it in {n} days, the same each day.",
            question="How [many dollars|much] does {who} spend each day?",
        ),
    ),
    questions=(
        "How many dollars does {who} have [now|in the end]?",
        "How much [money |]does {who} have[| now][|, in dollars]?",
    ),
    remaining=("How [many dollars|much|much money] does {who} have left?",),
    result="${r}",
)

TANK = Family(
    items=("liters", "gallons", "buckets"),
    openings=(
        "A tank [holds|has] {a} {items} of water.",
        "{who} pours {a} {items} of water into an empty tank.",
    ),
    starts=(
        Step("*", "A pump fills a tank with {a} {items} of water a minute for {n} minutes."),
        Step("+", "{who} pours {a} {items} of cold and {n} {items} of hot water into a tank."),
    ),
    steps=(
        Step("+", "Rain adds {n}[| more] {items}."),
        Step("+", "{who} pours in {n}[| more] {items}."),
        Step("-", "{who} [takes out|uses] {n} {items}."),
        Step("-", "{n} {items} [leak|run|flow] out."),
        Step("/", "Then half of the water runs out.", operand=2),
        Step("*", "Overnight the water rises to {n} times as much."),
        Step(
            "/",
            "{who} fills {n} equal barrels with all of it.",
            question="How many {items} are in each barrel?",
        ),
    ),
    questions=(
        "How many {items} of water are in the tank[| now]?",
        "How many {items} does the tank hold in the end?",
    ),
    remaining=("How many {items} are left?",),
)

POINTS = Family(
    items=("points",),
    openings=("{who} [scores|wins|makes] {a} {items} in a game.", "{who} begins the round with {a} {items}."),
    starts=(
        Step("*", "{who} hits {n} targets worth {a} {items} each."),
        Step("*", "{who} clears {n} levels and gets {a} {items} for each."),
        Step("+", "{who} scores {a} {items} in one game and {n} in another."),
    ),
    steps=(
        Step("+", "{who} gets a bonus of {n} {items}."),
        Step("+", "In the next [round|game] {who} scores {n}[| more| {items}]."),
        Step("-", "A mistake costs {n} {items}."),
        Step("-", "{who} [spends {n} {items} on a hint|loses {n} {items}|loses {n}]."),
        Step("*", "A magic star makes the score {n} times as high."),
        Step("*", "A lucky card doubles the score.", operand=2),
        Step("/", "A trap cuts the score in half.", operand=2),
        Step("/", "A wizard divides the score by {n}."),
    ),
    questions=("How many {items} does {who} have [in the end|now]?", "What is {who}'s final score?"),
)

SCHOOL = Family(
    items=("children", "pupils", "girls", "boys", "students"),
    openings=(
        "There are {a} {items} in {who}'s [school club|class|team].",
        "{a} {items} meet at {who}'s school.",
    ),
    starts=(
        Step("*", "There are {n} classes of {a} {items} in {who}'s school."),
        Step("+", "{a} {items} come by foot and {n} [|{items} ]come by bike to {who}'s school."),
    ),
    steps=(
        Step("+", "{n} more[| {items}] [join|come]."),
        Step("+", "Another school sends {n}[| {items}| more]."),
        Step("-", "{n} [|{items} |of them ]go home."),
        Step("-", "{n} [|{items} |of them ]are ill and leave."),
        Step("*", "For the festival the number of {items} becomes {n} times as large."),
        Step("/", "Half of the {items} go home for lunch.", operand=2),
        Step(
            "/",
            "The {items} form {n} teams of the same size.",
            question="How many {items} are in each team?",
        ),
        Step(
            "*",
            "Each of the {items} gets {n} sheets of paper.",
            question="How many sheets of paper do they get?",
            result="{r} sheets",
        ),
    ),
    questions=("How many {items} are [there now|there in the end|there]?",),
    remaining=("How many {items} are left?",),
)

WAREHOUSE = Family(
    items=("boxes", "crates", "parcels", "barrels", "cartons", "sacks"),
    openings=(
        "{who} stores {a} {items}.",
        "A [warehouse|ship|truck] [holds|has] {a} {items}.",
        "{a} {items} stand in {who}'s hall.",
    ),
    starts=(
        Step("*", "{n} trucks bring {a} {items} each to {who}'s hall."),
        Step("*", "{who} stacks {n} shelves with {a} {items} on each[| shelf]."),
        Step("+", "One ship carries {a} {items} and another one {n}."),
    ),
    steps=(
        Step("+", "A [truck|ship] brings {n}[| {items}| more]."),
        Step("+", "{n} [|{items} |more ]arrive by train."),
        Step("-", "{who} [ships|sends|sells] {n}[| {items}| of them] to a customer."),
        Step("-", "{n} [|{items} |of them ]are sent back."),
        Step("*", "By winter the stock is {n} times as large."),
        Step("/", "{who} moves half of the {items} to another town.", operand=2),
        Step(
            "/",
            "{who} loads [all|all the|the] {items} on {n} trucks, the same number on each.",
            question="How many {items} are on each truck?",
        ),
        Step(
            "*",
            "Each of the {items} weighs {n} kilograms.",
            question="How many kilograms do the {items} weigh together?",
            result="{r} kilograms",
        ),
    ),
    questions=("How many {items} are [there now|in store in the end|there]?",),
    remaining=("How many {items} are left?",),
)

COMPARISON = Family(
    items=("apples", "books", "pencils", "balloons", "nuts", "photos", "magnets", "puzzles", "postcards"),
    openings=("{who} [has|brings|buys|finds] {a} {items}.",),
    starts=(),
    steps=(
        Step("+", "{who} has {n} more[| {items}] than {prev}."),
        Step("+", "{prev} has {n} fewer[| {items}] than {who}."),
        Step("-", "{who} has {n} fewer[| {items}] than {prev}."),
        Step("-", "{prev} has {n} more[| {items}] than {who}."),
        Step("*", "{who} has {n} times as many[| {items}] as {prev}."),
        Step("*", "{who} has twice as many[| {items}] as {prev}.", operand=2),
        Step("/", "{who} has half as many[| {items}] as {prev}.", operand=2),
        Step("/", "{prev} has {n} times as many[| {items}] as {who}."),
        Step(
            "total",
            "",
            question="How many {items} do [they|all of them] have [altogether|together|in total]?",
            working="Together they have",
        ),
    ),
    questions=("How many {items} does {who} have?", "How many {items} has {who}?"),
    working="{who} has",
    relay=True,
)

AGES = Family(
    items=("years",),
    openings=("{who} is {a} {items} old.", "{who} is {a}."),
    starts=(),
    steps=(
        Step("+", "{who} is {n} {items} older than {prev}."),
        Step("+", "{prev} is {n} {items} younger than {who}."),
        Step("-", "{who} is {n} {items} younger than {prev}."),
        Step("-", "{prev} is {n} {items} older than {who}."),
        Step("*", "{who} is {n} times as old as {prev}."),
        Step("*", "{who} is twice as old as {prev}.", operand=2),
        Step("/", "{who} is half as old as {prev}.", operand=2),
        Step("total", "", question="How [many {items} |]old are they together?", working="Together they are"),
    ),
    questions=("How old is {who}?", "What is the age of {who}[| in {items}]?"),
    result="{r} {items} old",
    working="{who} is",
    relay=True,
)

JOURNEY = Family(
    items=("kilometers", "miles", "meters"),
    openings=("{who} plans a trip of {a} {items}.", "{who} has to [go|walk|drive] {a} {items}."),
    starts=(
        Step("*", "{who} plans to ride {a} {items} a day for {n} days."),
        Step("+", "{who} plans to go {a} {items} by train and {n} {items} by boat."),
    ),
    steps=(
        Step("+", "A closed road makes the way {n} {items} longer."),
        Step("+", "{who} adds a visit that takes {n} {items}."),
        Step("-", "{who} [goes|drives|walks] {n} {items} before noon."),
        Step("-", "A short cut saves {n} {items}."),
        Step("-", "{who} walks {n} {items} and rests."),
        Step("*", "{who} changes the plan and wants to go {n} times as far."),
        Step("/", "{who} goes half of the [remaining way|rest].", operand=2),
        Step(
            "/",
            "{who} goes the rest in {n} equal stages.",
            question="How many {items} long is each stage?",
        ),
    ),
    questions=("How many {items} are left[| to go]?", "How many {items} does {who} still have to go?"),
)

FAMILIES: dict[str, Family] = {
    "things": THINGS,
    "visitors": VISITORS,
    "collection": COLLECTION,
    "shopping": SHOPPING,
    "bakery": BAKERY,
    "bus": BUS,
    "reading": READING,
    "garden": GARDEN,
    "savings": SAVINGS,
    "tank": TANK,
    "points": POINTS,
    "school": SCHOOL,
    "warehouse": WAREHOUSE,
    "comparison": COMPARISON,
    "ages": AGES,
    "journey": JOURNEY,
}

SHE = (
    "Ada", "Aisha", "Ana", "Bea", "Carla", "Clara", "Dora", "Elif", "Ella", "Eva", "Fay", "Gia", "Hana", "Ida", "Ines",
    "Jana", "Joy", "Kim", "Lara", "Lin", "Liz", "Mary", "Maya", "Mia", "Nina", "Ola", "Petra", "Rita", "Rosa", "Ruth",
    "Sara", "Sue", "Uma", "Vera", "Yara", "Yuki", "Zoe",
)  # fmt: skip
HE = (
    "Alan", "Amir", "Anton", "Ben", "Bo", "Cem", "Chen", "Dan", "Ed", "Emil", "Felix", "Finn", "Hugo", "Igor", "Ivan",
    "Jack", "Jim", "Kai", "Leo", "Luca", "Max", "Nam", "Noah", "Omar", "Otto", "Paul", "Quin", "Sam", "Tariq", "Tim",
    "Tom", "Vik", "Wei", "Will",
)  # fmt: skip
PRONOUNS: dict[str, str] = {**dict.fromkeys(SHE, "she"), **dict.fromkeys(HE, "he")}
"""The people of the stories, and what they are called when they were named before."""

"""The stories that arithmetic word problems are made of.

A story is about one quantity: it begins with a number or with a first calculation, each step changes the quantity, and
a question asks for it. Placeholders: ``{who}`` the person, ``{prev}`` the person before (in a relay), ``{items}`` what
is counted, ``{a}`` the first number, ``{n}`` the number of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Operation = Literal["+", "-", "*", "/", "total"]


@dataclass(frozen=True)
class Step:
    """One calculation: what happens in the story, and how the solution words it.

    Args:
        op: what happens to the quantity; ``total`` adds up the quantities of all persons of a relay.
        story: the sentence that tells it.
        working: the solution's words before the result.
        operand: the number where the story has a word for it, such as "twice".
        question: asks for the result of this step, which then is the last one; empty: the family asks.
        result: the solution's words for the result ``{r}``; empty: as the family has it.
    """

    op: Operation
    story: str
    working: str
    operand: int | None = None
    question: str = ""
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
        result: the solution's words for a result ``{r}``.
        relay: every step is about another person than the one before.
    """

    items: tuple[str, ...]
    openings: tuple[str, ...]
    starts: tuple[Step, ...]
    steps: tuple[Step, ...]
    questions: tuple[str, ...]
    result: str = "{r} {items}"
    relay: bool = False


COLLECTION = Family(
    items=("marbles", "stickers", "stamps", "coins", "shells", "cards", "buttons", "beads", "badges", "pebbles"),
    openings=(
        "{who} has {a} {items}.",
        "{who} owns {a} {items}.",
        "{who} starts with {a} {items}.",
        "{who} collects {items} and has {a} of them.",
    ),
    starts=(
        Step("*", "{who} has {n} bags with {a} {items} in each.", "The bags hold"),
        Step("*", "{who} fills {n} pages of an album with {a} {items} on each page.", "The album holds"),
        Step("+", "{who} has {a} red {items} and {n} blue {items}.", "That makes"),
        Step(
            "+",
            "After giving away {n} {items}, {who} has {a} {items} left.",
            "At first {who} had",
            question="How many {items} did {who} have at first?",
        ),
        Step(
            "-",
            "After finding {n} {items}, {who} has {a} {items}.",
            "Before that {who} had",
            question="How many {items} did {who} have before?",
        ),
    ),
    steps=(
        Step("+", "{who} finds {n} more {items}.", "Now {who} has"),
        Step("+", "A friend gives {who} {n} {items}.", "With the gift {who} has"),
        Step("+", "{who} wins {n} {items} in a game.", "After the game {who} has"),
        Step("-", "{who} gives {n} {items} to a friend.", "Then {who} has"),
        Step("-", "{who} loses {n} {items}.", "That leaves"),
        Step("-", "{who} trades away {n} {items}.", "After the trade {who} has"),
        Step("*", "A year later {who} has {n} times as many {items}.", "A year later {who} has"),
        Step("*", "{who} doubles the collection.", "Doubled, that makes", operand=2),
        Step("/", "{who} makes {n} equal piles of the {items} and keeps one pile.", "One pile has"),
        Step("/", "{who} gives half of the {items} to a cousin.", "Half of them is", operand=2),
        Step(
            "/",
            "{who} puts all {items} into {n} boxes, the same number in each.",
            "Each box holds",
            question="How many {items} are in each box?",
        ),
        Step(
            "*",
            "Each of the {items} is worth ${n}.",
            "They are worth",
            question="How many dollars are the {items} worth together?",
            result="${r}",
        ),
    ),
    questions=(
        "How many {items} does {who} have now?",
        "How many {items} does {who} have in the end?",
        "How many {items} are left with {who}?",
    ),
)

SHOPPING = Family(
    items=("pens", "notebooks", "mugs", "shirts", "towels", "candles", "toys", "plates", "hats", "lamps"),
    openings=("{who} has {items} worth ${a} in the basket.", "{who} picks {items} for ${a}."),
    starts=(
        Step("*", "{who} buys {n} {items} for ${a} each.", "The {items} cost"),
        Step("*", "In a shop {items} cost ${a} apiece, and {who} takes {n} of them.", "The {items} cost"),
        Step("+", "{who} buys {items} for ${a} and a bag for ${n}.", "Together they cost"),
    ),
    steps=(
        Step("+", "{who} also buys a book for ${n}.", "With the book that is"),
        Step("+", "Wrapping costs ${n}.", "With the wrapping that is"),
        Step("+", "Delivery adds ${n} to the bill.", "With delivery that is"),
        Step("-", "A coupon takes ${n} off the bill.", "With the coupon that is"),
        Step("-", "The shop gives a discount of ${n}.", "After the discount that is"),
        Step("*", "{who} orders the same for {n} schools, one order for each.", "All the orders cost"),
        Step("/", "Everything is sold at half price today.", "Half of it is", operand=2),
        Step(
            "/",
            "{n} friends share the bill equally.",
            "Each friend pays",
            question="How many dollars does each friend pay?",
        ),
    ),
    questions=(
        "How many dollars does it cost?",
        "How much does {who} have to pay, in dollars?",
        "What is the bill in dollars?",
    ),
    result="${r}",
)

BAKERY = Family(
    items=("cookies", "muffins", "rolls", "pies", "cupcakes", "tarts", "bagels", "waffles"),
    openings=("{who} bakes {a} {items}.", "There are {a} {items} in {who}'s bakery."),
    starts=(
        Step("*", "{who} bakes {n} trays of {items} with {a} on each tray.", "The trays hold"),
        Step("+", "{who} bakes {a} {items} in the morning and {n} in the afternoon.", "The day's baking is"),
    ),
    steps=(
        Step("+", "{who} bakes another {n} {items}.", "With those there are"),
        Step("+", "A helper brings {n} fresh {items}.", "With the fresh ones there are"),
        Step("-", "{who} sells {n} {items}.", "After the sale there are"),
        Step("-", "The children eat {n} {items}.", "Not eaten are"),
        Step("-", "{n} {items} get burnt and are thrown away.", "Good are"),
        Step("*", "For a party {who} needs {n} times that number and bakes the rest.", "For the party there are"),
        Step("/", "{who} gives away half of the {items}.", "Half of them is", operand=2),
        Step(
            "/",
            "{who} packs all {items} in {n} equal boxes.",
            "A box has",
            question="How many {items} are in a box?",
        ),
        Step(
            "*",
            "Each one sells for ${n}.",
            "They bring in",
            question="How many dollars do the {items} bring in?",
            result="${r}",
        ),
    ),
    questions=("How many {items} are there in the end?", "How many {items} are there now?"),
)

BUS = Family(
    items=("passengers", "people", "tourists", "students", "travelers"),
    openings=("A bus leaves the station with {a} {items}.", "There are {a} {items} on {who}'s bus."),
    starts=(
        Step("+", "{a} {items} sit and {n} {items} stand on {who}'s bus.", "The bus carries"),
        Step("*", "{who} drives a train of {n} cars with {a} {items} in each car.", "The train carries"),
    ),
    steps=(
        Step("+", "At the next stop {n} {items} get on.", "On board are now"),
        Step("+", "{n} {items} climb aboard at the market.", "After the market there are"),
        Step("-", "At the next stop {n} {items} get off.", "Still on board are"),
        Step("-", "{n} {items} leave at the school.", "After the school there are"),
        Step("/", "At the bridge half of the {items} get off.", "Half of them is", operand=2),
        Step("*", "At the stadium the number of {items} on board grows to {n} times as many.", "That makes"),
        Step(
            "*",
            "Every one of them pays ${n}.",
            "They pay",
            question="How many dollars do they pay?",
            result="${r}",
        ),
        Step(
            "/",
            "At the last stop they form {n} equal groups.",
            "Each group has",
            question="How many {items} are in each group?",
        ),
    ),
    questions=("How many {items} are on board now?", "How many {items} are on board in the end?"),
)

READING = Family(
    items=("pages",),
    openings=("{who} has a book of {a} {items} to read.", "{who} must read {a} {items} for school."),
    starts=(
        Step("*", "{who} has {n} chapters to read with {a} {items} in each.", "To read are"),
        Step("+", "{who} has two stories to read, one of {a} {items} and one of {n} {items}.", "To read are"),
    ),
    steps=(
        Step("-", "{who} reads {n} {items} on Monday.", "After Monday there are"),
        Step("-", "{who} reads {n} {items} before bed.", "After that there are"),
        Step("-", "The teacher lets {who} skip {n} {items}.", "Without those there are"),
        Step("+", "The teacher adds {n} {items} to the reading.", "With those there are"),
        Step("+", "{who} must also read a letter of {n} {items}.", "With the letter there are"),
        Step("/", "Over the weekend {who} reads half of what is left.", "Half of it is", operand=2),
        Step("*", "Then the reading list becomes {n} times as long.", "The list grows to"),
        Step(
            "/",
            "{who} reads the rest in {n} days, the same number of {items} each day.",
            "Each day {who} reads",
            question="How many {items} does {who} read each day?",
        ),
    ),
    questions=("How many {items} are left to read?", "How many {items} does {who} still have to read?"),
)

GARDEN = Family(
    items=("tulips", "carrots", "cabbages", "bushes", "beans", "roses", "pumpkins", "lilies", "onions"),
    openings=("{who} grows {a} {items}.", "There are {a} {items} in {who}'s garden."),
    starts=(
        Step("*", "{who} plants {n} rows of {items} with {a} in each row.", "The rows hold"),
        Step("*", "{who} has {n} garden beds, each with {a} {items}.", "The beds hold"),
        Step("+", "{who} plants {a} {items} in spring and {n} in summer.", "Planted are"),
    ),
    steps=(
        Step("+", "{who} plants {n} more {items}.", "With the new ones there are"),
        Step("+", "A neighbor plants {n} {items} there too.", "With the neighbor's there are"),
        Step("-", "Rabbits eat {n} {items}.", "The rabbits leave"),
        Step("-", "{who} picks {n} {items}.", "Not picked are"),
        Step("-", "Frost kills {n} {items}.", "Alive are"),
        Step("*", "The next year {who} grows {n} times as many {items}.", "The next year there are"),
        Step("/", "A storm destroys half of the {items}.", "The storm leaves", operand=2),
        Step(
            "/",
            "{who} ties all {items} into {n} equal bundles.",
            "Each bundle has",
            question="How many {items} are in each bundle?",
        ),
    ),
    questions=("How many {items} are in the garden now?", "How many {items} does {who} have in the garden?"),
)

SAVINGS = Family(
    items=("dollars",),
    openings=("{who} has ${a} in the bank.", "{who} saved ${a}.", "There are ${a} in {who}'s purse."),
    starts=(
        Step("*", "{who} saves ${a} a week for {n} weeks.", "{who} saves"),
        Step("*", "{who} works {n} hours for ${a} an hour.", "The work brings"),
        Step("+", "{who} gets ${a} from an aunt and ${n} from an uncle.", "{who} gets"),
    ),
    steps=(
        Step("+", "{who} earns ${n} by washing cars.", "With the earnings {who} has"),
        Step("+", "Grandma gives {who} ${n}.", "With Grandma's money {who} has"),
        Step("-", "{who} spends ${n} on lunch.", "After lunch {who} has"),
        Step("-", "{who} pays ${n} for a ticket.", "After the ticket {who} has"),
        Step("-", "{who} lends ${n} to a friend.", "That leaves"),
        Step("*", "A year later the money has become {n} times as much.", "It becomes"),
        Step("/", "{who} gives half of the money to charity.", "Half of it is", operand=2),
        Step("/", "{who} puts the money in {n} equal parts and keeps one part.", "One part is"),
        Step(
            "/",
            "{who} spends all of it in {n} days, the same each day.",
            "Each day {who} spends",
            question="How many dollars does {who} spend each day?",
        ),
    ),
    questions=("How many dollars does {who} have now?", "How much money does {who} have left, in dollars?"),
    result="${r}",
)

TANK = Family(
    items=("liters", "gallons", "buckets"),
    openings=("A tank holds {a} {items} of water.", "{who} pours {a} {items} of water into an empty tank."),
    starts=(
        Step("*", "A pump fills a tank with {a} {items} of water a minute for {n} minutes.", "The pump delivers"),
        Step("+", "{who} pours {a} {items} of cold and {n} {items} of hot water into a tank.", "The tank gets"),
    ),
    steps=(
        Step("+", "Rain adds {n} {items}.", "After the rain there are"),
        Step("+", "{who} pours in {n} {items}.", "With those there are"),
        Step("-", "{who} takes out {n} {items}.", "That leaves"),
        Step("-", "{n} {items} leak out.", "After the leak there are"),
        Step("/", "Then half of the water runs out.", "Half of it is", operand=2),
        Step("*", "Overnight the water rises to {n} times as much.", "It rises to"),
        Step(
            "/",
            "{who} fills {n} equal barrels with all of it.",
            "Each barrel gets",
            question="How many {items} are in each barrel?",
        ),
    ),
    questions=("How many {items} of water are in the tank now?", "How many {items} does the tank hold in the end?"),
)

POINTS = Family(
    items=("points",),
    openings=("{who} scores {a} {items} in a game.", "{who} begins the round with {a} {items}."),
    starts=(
        Step("*", "{who} hits {n} targets worth {a} {items} each.", "The targets give"),
        Step("*", "{who} clears {n} levels and gets {a} {items} for each.", "The levels give"),
        Step("+", "{who} scores {a} {items} in one game and {n} in another.", "Both games give"),
    ),
    steps=(
        Step("+", "{who} gets a bonus of {n} {items}.", "With the bonus that is"),
        Step("+", "In the next round {who} scores {n} {items}.", "After that round {who} has"),
        Step("-", "A mistake costs {n} {items}.", "After the mistake that is"),
        Step("-", "{who} spends {n} {items} on a hint.", "After the hint {who} has"),
        Step("*", "A magic star makes the score {n} times as high.", "The star makes it"),
        Step("*", "A lucky card doubles the score.", "Doubled, that is", operand=2),
        Step("/", "A trap cuts the score in half.", "Half of it is", operand=2),
        Step("/", "A wizard divides the score by {n}.", "The wizard leaves"),
    ),
    questions=("How many {items} does {who} have in the end?", "What is {who}'s final score?"),
)

SCHOOL = Family(
    items=("children", "pupils", "girls", "boys", "students"),
    openings=("There are {a} {items} in {who}'s school club.", "{a} {items} meet at {who}'s school."),
    starts=(
        Step("*", "{who}'s school has {n} classes of {a} {items}.", "The classes have"),
        Step("+", "{a} {items} come by foot and {n} {items} come by bike to {who}'s school.", "There come"),
    ),
    steps=(
        Step("+", "{n} more {items} join.", "With them there are"),
        Step("+", "Another school sends {n} {items}.", "With the guests there are"),
        Step("-", "{n} {items} go home.", "There stay"),
        Step("-", "{n} {items} are ill and leave.", "Healthy are"),
        Step("*", "For the festival the number of {items} becomes {n} times as large.", "At the festival there are"),
        Step("/", "Half of the {items} go home for lunch.", "Half of them is", operand=2),
        Step(
            "/",
            "They form {n} teams of the same size.",
            "Each team has",
            question="How many {items} are in each team?",
        ),
        Step(
            "*",
            "Each of them gets {n} sheets of paper.",
            "They get",
            question="How many sheets of paper do they get?",
            result="{r} sheets",
        ),
    ),
    questions=("How many {items} are there now?", "How many {items} are there in the end?"),
)

WAREHOUSE = Family(
    items=("boxes", "crates", "parcels", "barrels", "cartons", "sacks"),
    openings=("{who} stores {a} {items}.", "A warehouse holds {a} {items}.", "{a} {items} stand in {who}'s hall."),
    starts=(
        Step("*", "{n} trucks bring {a} {items} each to {who}'s hall.", "The trucks bring"),
        Step("*", "{who} stacks {n} shelves with {a} {items} on each shelf.", "The shelves hold"),
        Step("+", "One ship carries {a} {items} and another one {n}.", "Both carry"),
    ),
    steps=(
        Step("+", "A truck brings {n} {items}.", "With the delivery there are"),
        Step("+", "{n} {items} arrive by train.", "After the train there are"),
        Step("-", "{who} ships {n} {items} to a customer.", "There remain"),
        Step("-", "{n} {items} are sent back.", "Not sent back are"),
        Step("*", "By winter the stock is {n} times as large.", "By winter there are"),
        Step("/", "{who} moves half of the {items} to another town.", "Half of them is", operand=2),
        Step(
            "/",
            "{who} loads all {items} on {n} trucks, the same number on each.",
            "Each truck gets",
            question="How many {items} are on each truck?",
        ),
        Step(
            "*",
            "Each of them weighs {n} kilograms.",
            "They weigh",
            question="How many kilograms do the {items} weigh together?",
            result="{r} kilograms",
        ),
    ),
    questions=("How many {items} are there now?", "How many {items} are in store in the end?"),
)

COMPARISON = Family(
    items=("apples", "books", "pencils", "balloons", "nuts", "photos", "magnets", "puzzles", "postcards"),
    openings=("{who} has {a} {items}.", "{who} brings {a} {items}."),
    starts=(),
    steps=(
        Step("+", "{who} has {n} more {items} than {prev}.", "{who} has"),
        Step("+", "{prev} has {n} fewer {items} than {who}.", "{who} has"),
        Step("-", "{who} has {n} fewer {items} than {prev}.", "{who} has"),
        Step("-", "{prev} has {n} more {items} than {who}.", "{who} has"),
        Step("*", "{who} has {n} times as many {items} as {prev}.", "{who} has"),
        Step("*", "{who} has twice as many {items} as {prev}.", "{who} has", operand=2),
        Step("/", "{who} has half as many {items} as {prev}.", "{who} has", operand=2),
        Step("/", "{prev} has {n} times as many {items} as {who}.", "{who} has"),
        Step("total", "", "Together they have", question="How many {items} do they have altogether?"),
        Step("total", "", "All of them have", question="How many {items} do all of them have in total?"),
    ),
    questions=("How many {items} does {who} have?", "How many {items} has {who}?"),
    relay=True,
)

AGES = Family(
    items=("years",),
    openings=("{who} is {a} {items} old.",),
    starts=(),
    steps=(
        Step("+", "{who} is {n} {items} older than {prev}.", "{who} is"),
        Step("+", "{prev} is {n} {items} younger than {who}.", "{who} is"),
        Step("-", "{who} is {n} {items} younger than {prev}.", "{who} is"),
        Step("-", "{prev} is {n} {items} older than {who}.", "{who} is"),
        Step("*", "{who} is {n} times as old as {prev}.", "{who} is"),
        Step("*", "{who} is twice as old as {prev}.", "{who} is", operand=2),
        Step("/", "{who} is half as old as {prev}.", "{who} is", operand=2),
        Step("total", "", "Together they are", question="How many {items} old are they together?"),
    ),
    questions=("How old is {who}?", "What is the age of {who} in {items}?"),
    result="{r} {items} old",
    relay=True,
)

JOURNEY = Family(
    items=("kilometers", "miles", "meters"),
    openings=("{who} plans a trip of {a} {items}.", "{who} has to go {a} {items}."),
    starts=(
        Step("*", "{who} plans to ride {a} {items} a day for {n} days.", "The plan is"),
        Step("+", "{who} plans to go {a} {items} by train and {n} {items} by boat.", "The plan is"),
    ),
    steps=(
        Step("+", "A closed road makes the way {n} {items} longer.", "The way becomes"),
        Step("+", "{who} adds a visit that takes {n} {items}.", "With the visit it is"),
        Step("-", "{who} goes {n} {items} before noon.", "After noon there remain"),
        Step("-", "A short cut saves {n} {items}.", "With the short cut it is"),
        Step("-", "{who} walks {n} {items} and rests.", "After the rest there remain"),
        Step("*", "{who} changes the plan and wants to go {n} times as far.", "The new plan is"),
        Step("/", "{who} goes half of the remaining way.", "Half of it is", operand=2),
        Step(
            "/",
            "{who} goes the rest in {n} equal stages.",
            "Each stage is",
            question="How many {items} long is each stage?",
        ),
    ),
    questions=("How many {items} are left to go?", "How many {items} does {who} still have to go?"),
)

FAMILIES: dict[str, Family] = {
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

NAMES = (
    "Ada", "Aisha", "Alan", "Amir", "Ana", "Anton", "Bea", "Ben", "Bo", "Carla", "Cem", "Chen", "Clara", "Dan", "Dora",
    "Ed", "Elif", "Ella", "Emil", "Eva", "Fay", "Felix", "Finn", "Gia", "Hana", "Hugo", "Ida", "Igor", "Ines", "Ivan",
    "Jack", "Jana", "Jim", "Joy", "Kai", "Kim", "Lara", "Leo", "Lin", "Liz", "Luca", "Mary", "Max", "Maya", "Mia",
    "Nam", "Nina", "Noah", "Ola", "Omar", "Otto", "Paul", "Petra", "Quin", "Rita", "Rosa", "Ruth", "Sam", "Sara", "Sue",
    "Tariq", "Tim", "Tom", "Uma", "Vera", "Vik", "Wei", "Will", "Yara", "Yuki", "Zoe",
)  # fmt: skip

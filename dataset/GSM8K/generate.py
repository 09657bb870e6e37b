"""Write train.json and test.json: made-up word problems in the form of GSM8K. Run it without arguments.

    python dataset/GSM8K/generate.py                # rewrites the two files beside this script, byte for byte
    python dataset/GSM8K/generate.py --out_dir /tmp # somewhere else

A *family* is one kind of story: a function that draws names and numbers and returns the question, the solution
lines and the answer it expects. Solutions carry GSM8K's calculator annotations, `<<3*4=12>>`, and end in `#### 12`.
Every number in them is a whole number of at least 2, which also spares us "1 apples".

`python` alone decides the files' content: random.Random with a fixed seed, no package needed.
"""

import argparse
import ast
import json
import operator
import random
import re
from collections import namedtuple
from pathlib import Path

SEED = 8_000
N_TRAIN = 2000
N_TEST_SEEN = 150  # families of the train file, other numbers
N_TEST_UNSEEN = 50  # families that the train file does not have

# ----------------------------------------------------------------------------------------------------------------
# Arithmetic


class DoesNotComeOut(Exception):
    """The numbers drawn lead to a fraction, a negative number, or something silly; draw again."""


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def evaluate(expression):
    """The whole number that an expression of + - * / and brackets comes to (a parser, not eval)."""

    def walk(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            quotient, rest = divmod(walk(node.left), walk(node.right))
            if rest:
                raise DoesNotComeOut(expression)
            return quotient
        raise ValueError(f"cannot evaluate {expression!r}: only whole numbers, + - * / and brackets are allowed")

    return walk(ast.parse(expression, mode="eval").body)


def calc(expression, unit=""):
    """`calc("48/2")` is "48/2 = <<48/2=24>>24"; with unit "$" the sign goes before the result."""
    value = evaluate(expression)
    if not 2 <= value < 100_000:
        raise DoesNotComeOut(expression)
    return f"{expression} = {unit}<<{expression}={value}>>{value}"


# ----------------------------------------------------------------------------------------------------------------
# Names and things

Person = namedtuple("Person", "name he his")

_SHE = "Amara Beatriz Chloe Dana Elif Fatima Grace Hana Ines Julia Keiko Leila Mei Nora Olga Priya Rosa Sofia Tara Zoe"
_HE = "Adam Bilal Carlos David Emeka Felix George Hugo Ivan Jamal Kofi Liam Mateo Nikhil Omar Pavel Ravi Sven Tomas Uri"
PEOPLE = [Person(n, "she", "her") for n in _SHE.split()] + [Person(n, "he", "his") for n in _HE.split()]

THINGS = "marbles stickers shells buttons coins stamps beads postcards badges crayons".split()
FRUIT = "apples pears plums oranges peaches lemons mangoes figs".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def people(r, n):
    return r.sample(PEOPLE, n)


# ----------------------------------------------------------------------------------------------------------------
# Families of both files. One step


def two_piles(r):
    (p,), (x, y) = people(r, 1), r.sample(FRUIT, 2)
    a, b = r.randint(3, 40), r.randint(3, 40)
    question = r.choice([
        f"{p.name} picked {a} {x} and {b} {y}. How many pieces of fruit did {p.he} pick in all?",
        f"There are {a} {x} and {b} {y} in {p.name}'s basket. How many pieces of fruit are in the basket?",
        f"{p.name} buys {a} {x}. Then {p.he} buys {b} {y}. How many pieces of fruit did {p.he} buy altogether?",
    ])
    return question, [f"{p.name} has {calc(f'{a}+{b}')} pieces of fruit."], a + b


def gave_some_away(r):
    (p, q), x = people(r, 2), r.choice(THINGS)
    a = r.randint(8, 60)
    b = r.randint(3, a - 3)
    question = r.choice([
        f"{p.name} had {a} {x} and gave {b} of them to {q.name}. How many {x} does {p.name} have left?",
        f"{p.name} collected {a} {x}. {q.name} got {b} of them as a present. How many {x} did {p.name} keep?",
        f"Out of {p.name}'s {a} {x}, {b} were lost on a trip with {q.name}. How many {x} are left?",
    ])
    return question, [f"There are {calc(f'{a}-{b}')} {x} left."], a - b


def full_packs(r):
    (p,), x = people(r, 1), r.choice(THINGS)
    packs, each = r.randint(3, 12), r.randint(4, 15)
    question = r.choice([
        f"{p.name} has {packs} bags with {each} {x} in each bag. How many {x} does {p.he} have?",
        f"A bag holds {each} {x}. {p.name} buys {packs} full bags. How many {x} is that?",
        f"{p.name} fills {packs} jars and puts {each} {x} into every jar. How many {x} does {p.he} use?",
    ])
    return question, [f"{p.name} has {calc(f'{packs}*{each}')} {x}."], packs * each


def share_equally(r):
    (p,), x = people(r, 1), r.choice(FRUIT)
    friends, each = r.randint(3, 12), r.randint(2, 15)
    total = friends * each
    question = r.choice([
        f"{p.name} shares {total} {x} equally among {friends} friends. How many {x} does each friend get?",
        f"{friends} children split {total} {x} so that all get the same number. How many {x} are there for each child?",
        f"{p.name} puts {total} {x} into {friends} boxes, the same number in every box. How many {x} are in one box?",
    ])
    return question, [f"That is {calc(f'{total}/{friends}')} {x} for each."], each


def how_many_more(r):
    (p, q), x = people(r, 2), r.choice(THINGS)
    b = r.randint(4, 60)
    a = b + r.randint(2, 40)
    question = r.choice([
        f"{p.name} has {a} {x} and {q.name} has {b} {x}. How many more {x} does {p.name} have than {q.name}?",
        f"{q.name} found {b} {x}, while {p.name} found {a}. How many fewer {x} did {q.name} find than {p.name}?",
        f"{p.name} and {q.name} count their {x}. {p.name} has {a} and {q.name} has {b}. By how many is {p.name} ahead?",
    ])
    return question, [f"The difference is {calc(f'{a}-{b}')} {x}."], a - b


# ----------------------------------------------------------------------------------------------------------------
# Two steps


def twice_as_many_pages(r):
    (p,), (day, next_day) = people(r, 1), r.choice(list(zip(DAYS, DAYS[1:])))
    pages, (word, times) = r.randint(6, 45), r.choice([("twice", 2), ("three times", 3), ("four times", 4)])
    second = times * pages
    question = r.choice([
        f"{p.name} reads {pages} pages on {day} and {word} as many on {next_day}. "
        f"How many pages does {p.he} read on the two days?",
        f"On {day} {p.name} wrote {pages} pages of a story. On {next_day} {p.he} wrote {word} as many pages. "
        f"How many pages did {p.he} write altogether?",
        f"{p.name} revised {pages} pages of notes on {day}, and {word} that number on {next_day}. What is the total?",
    ])
    return question, [
        f"On {next_day} it was {calc(f'{times}*{pages}')} pages.",
        f"In total that is {calc(f'{pages}+{second}')} pages.",
    ], pages + second


def change_from_a_note(r):
    (p,), (x, one) = people(r, 1), r.choice([("notebooks", "notebook"), ("pens", "pen"), ("muffins", "muffin"),
                                             ("kites", "kite"), ("candles", "candle"), ("mugs", "mug")])
    n, price, note = r.randint(2, 9), r.randint(2, 9), r.choice([20, 50, 100])
    cost = n * price
    question = r.choice([
        f"{p.name} buys {n} {x} at ${price} each and pays with a ${note} bill. How much change does {p.he} get?",
        f"A {one} costs ${price}. {p.name} has ${note} and buys {n} {x}. How many dollars does {p.he} have left?",
        f"{p.name} takes ${note} to the shop and comes home with {n} {x} that cost ${price} each. "
        f"How much money does {p.he} bring back?",
    ])
    return question, [
        f"The {x} cost {calc(f'{n}*{price}', '$')}.",
        f"{p.name} has {calc(f'{note}-{cost}', '$')} left.",
    ], note - cost


def saving_for_something(r):
    (p,), x = people(r, 1), r.choice(["bicycle", "guitar", "tent", "camera", "skateboard", "telescope"])
    weekly, weeks = r.randint(3, 20), r.randint(3, 12)
    saved = weekly * weeks
    price = saved + r.randint(5, 80)
    question = r.choice([
        f"{p.name} saves ${weekly} a week for a {x} that costs ${price}. "
        f"How much money is still missing after {weeks} weeks?",
        f"A {x} costs ${price}. For {weeks} weeks {p.name} has put aside ${weekly} every week. "
        f"How many more dollars does {p.he} need?",
        f"{p.name} would like a {x} for ${price}. If {p.he} saves ${weekly} each week, "
        f"how much will {p.he} still need after {weeks} weeks?",
    ])
    return question, [
        f"In {weeks} weeks {p.name} saves {calc(f'{weekly}*{weeks}', '$')}.",
        f"{p.name} still needs {calc(f'{price}-{saved}', '$')}.",
    ], price - saved


def weekly_wage(r):
    (p,), place = people(r, 1), r.choice(["a cafe", "a bookshop", "a garage", "a library", "a garden center"])
    hourly, hours, days = r.randint(9, 25), r.randint(2, 8), r.randint(2, 6)
    week = hours * days
    question = r.choice([
        f"{p.name} works at {place} for {hours} hours a day, {days} days a week, and earns ${hourly} an hour. "
        f"How much does {p.he} earn in a week?",
        f"At {place}, {p.name} is paid ${hourly} an hour. {p.name} works {days} days a week, {hours} hours each day. "
        f"What is {p.his} weekly pay in dollars?",
        f"{p.name} has a job at {place} that pays ${hourly} for every hour. How many dollars does {p.he} make in a "
        f"week of {days} working days with {hours} hours each?",
    ])
    return question, [
        f"{p.name} works {calc(f'{hours}*{days}')} hours a week.",
        f"{p.name} earns {calc(f'{week}*{hourly}', '$')} a week.",
    ], week * hourly


def garden_rows(r):
    (p,), x = people(r, 1), r.choice(["tomato plants", "tulips", "cabbages", "lettuces", "rose bushes", "bean plants"])
    rows, each = r.randint(3, 15), r.randint(4, 15)
    total = rows * each
    lost = r.randint(2, total // 3)
    question = r.choice([
        f"{p.name} plants {rows} rows of {x} with {each} in every row. Snails eat {lost} of them. "
        f"How many {x} are left?",
        f"There are {rows} rows of {each} {x} in {p.name}'s garden. "
        f"After a cold night {lost} have died. How many {x} survive?",
        f"{p.name} grows {x} in {rows} rows of {each} and sells {lost} of them. How many {x} does {p.he} still have?",
    ])
    return question, [
        f"At first there are {calc(f'{rows}*{each}')} {x}.",
        f"Afterwards {calc(f'{total}-{lost}')} {x} are left.",
    ], total - lost


def bus_stops(r):
    vehicle = r.choice(["bus", "tram", "train", "ferry"])
    start, off, on = r.randint(12, 50), r.randint(2, 11), r.randint(2, 20)
    after = start - off
    question = r.choice([
        f"A {vehicle} carries {start} passengers. At the next stop {off} get off and {on} get on. "
        f"How many passengers are on the {vehicle} now?",
        f"{start} people ride on a {vehicle}. Then {off} people leave it and {on} new people board. "
        f"How many people ride on now?",
        f"When a {vehicle} arrives, {start} people are on it. {off} of them step out, and {on} others step in. "
        f"How many people are on the {vehicle} when it leaves?",
    ])
    return question, [
        f"After {off} got off there were {calc(f'{start}-{off}')} people.",
        f"After {on} got on there were {calc(f'{after}+{on}')} people.",
    ], after + on


def shelves_and_a_pile(r):
    (p,), x = people(r, 1), r.choice(["books", "records", "board games", "comics", "magazines"])
    shelves, each, pile = r.randint(3, 10), r.randint(6, 25), r.randint(2, 20)
    shelved = shelves * each
    question = r.choice([
        f"{p.name} has {shelves} shelves with {each} {x} on each, and another {pile} {x} on the floor. "
        f"How many {x} does {p.he} own?",
        f"Each of {p.name}'s {shelves} shelves holds {each} {x}. {pile} more {x} lie on the table. "
        f"How many {x} are there altogether?",
        f"{p.name} filled {shelves} shelves with {each} {x} each. Then {pile} {x} were left over. "
        f"How many {x} does {p.he} have?",
    ])
    return question, [
        f"The shelves hold {calc(f'{shelves}*{each}')} {x}.",
        f"With the others that makes {calc(f'{shelved}+{pile}')} {x}.",
    ], shelved + pile


def groups_of_a_class(r):
    place = r.choice(["camp", "school trip", "sports day", "museum visit"])
    size, n_groups = r.randint(3, 8), r.randint(4, 12)
    children = size * n_groups
    girls = r.randint(3, children - 3)
    boys = children - girls
    question = r.choice([
        f"{girls} girls and {boys} boys go on a {place}. They form groups of {size}. How many groups are there?",
        f"For a {place}, {boys} boys and {girls} girls are put into groups of {size} children. "
        f"How many groups does that make?",
        f"A {place} has {girls} girls and {boys} boys. If each group has {size} children, how many groups are needed?",
    ])
    return question, [
        f"There are {calc(f'{girls}+{boys}')} children.",
        f"They form {calc(f'{children}/{size}')} groups.",
    ], n_groups


def filling_a_tank(r):
    x = r.choice(["tank", "pool", "pond", "barrel"])
    leak, net, minutes = r.randint(2, 8), r.randint(3, 15), r.randint(4, 30)
    fill, litres = leak + net, net * minutes
    question = r.choice([
        f"A tap puts {fill} liters of water a minute into an empty {x}, but {leak} liters a minute leak out. "
        f"How many minutes does it take until {litres} liters are in the {x}?",
        f"Each minute {fill} liters flow into an empty {x} and {leak} liters flow out again. "
        f"After how many minutes does it hold {litres} liters?",
        f"An empty {x} gains {fill} liters a minute from a hose and loses {leak} liters a minute through a crack. "
        f"It can hold {litres} liters. In how many minutes is it full?",
    ])
    return question, [
        f"Every minute the {x} gains {calc(f'{fill}-{leak}')} liters.",
        f"It takes {calc(f'{litres}/{net}')} minutes.",
    ], minutes


def pages_left(r):
    (p,), x = people(r, 1), r.choice(["novel", "history book", "travel guide", "book of fairy tales"])
    daily, days, read = r.randint(5, 30), r.randint(3, 14), r.randint(10, 90)
    left = daily * days
    total = left + read
    question = r.choice([
        f"{p.name} has read {read} pages of a {x} with {total} pages. If {p.he} reads {daily} pages a day from now on, "
        f"in how many days will {p.he} finish it?",
        f"A {x} has {total} pages, {read} of which {p.name} has read. {p.name} now reads {daily} pages every day. "
        f"How many more days does {p.he} need?",
        f"{p.name} has finished the first {read} pages of a {total}-page {x}. At {daily} pages a day, "
        f"how many days will the rest of it take?",
    ])
    return question, [
        f"There are {calc(f'{total}-{read}')} pages left.",
        f"They take {calc(f'{left}/{daily}')} days.",
    ], days


def boxes_of_tiles(r):
    (p,), room = people(r, 1), r.choice(["kitchen", "bathroom", "hall", "terrace"])
    long, wide, box = r.randint(4, 20), r.randint(3, 15), r.choice([4, 5, 6, 8, 10])
    tiles = long * wide
    if tiles % box:
        raise DoesNotComeOut
    question = r.choice([
        f"The floor of {p.name}'s {room} takes {long} rows of {wide} tiles. Tiles come in boxes of {box}. "
        f"How many boxes does {p.he} need?",
        f"{p.name} lays tiles in the {room}: {long} rows with {wide} tiles each. There are {box} tiles in a box. "
        f"How many boxes does {p.he} use?",
        f"To cover the {room}, {p.name} needs {wide} tiles in each of {long} rows. "
        f"How many boxes of {box} tiles must {p.he} buy?",
    ])
    return question, [
        f"The {room} needs {calc(f'{long}*{wide}')} tiles.",
        f"That is {calc(f'{tiles}/{box}')} boxes.",
    ], tiles // box


def monthly_plan(r):
    (p,), (what, unit, one) = people(r, 1), r.choice([
        ("phone", "gigabytes of data", "gigabyte"), ("gym", "guest passes", "pass"),
        ("printing", "color pages", "page"), ("car charging", "hours of charging", "hour")])
    base, rate, used = r.randint(8, 40), r.randint(2, 9), r.randint(3, 20)
    extra = rate * used
    question = r.choice([
        f"{p.name}'s {what} plan costs ${base} a month plus ${rate} for each {one}. "
        f"How much does {p.he} pay in a month with {used} {unit}?",
        f"A {what} plan has a fee of ${base} a month, and every {one} costs ${rate} more. "
        f"{p.name} has used {used} {unit} this month. How many dollars is {p.his} bill?",
        f"This month {p.name} used {used} {unit}. {p.name} pays ${rate} per {one} and a {what} plan fee of ${base}. "
        f"What does {p.he} pay in all?",
    ])
    return question, [
        f"The {unit} cost {calc(f'{rate}*{used}', '$')}.",
        f"The bill is {calc(f'{base}+{extra}', '$')}.",
    ], base + extra


def discount(r):
    (p,), x = people(r, 1), r.choice(["jacket", "lamp", "backpack", "suitcase", "clock", "rug"])
    percent, price = r.choice([10, 20, 25, 30, 40, 50, 75]), r.randint(2, 24) * 10
    if price * percent % 100:
        raise DoesNotComeOut
    off = price * percent // 100
    question = r.choice([
        f"A {x} costs ${price}. In the sale it is {percent}% cheaper. What does {p.name} pay for it in the sale?",
        f"{p.name} buys a {x} with a discount of {percent}%. Without the discount it costs ${price}. "
        f"How many dollars does {p.he} pay?",
        f"The shop takes {percent}% off a ${price} {x}. How much does {p.name} need to buy it?",
    ])
    return question, [
        f"The discount is {calc(f'{price}*{percent}/100', '$')}.",
        f"The {x} then costs {calc(f'{price}-{off}', '$')}.",
    ], price - off


def cookies_per_batch(r):
    (p,), x = people(r, 1), r.choice(["cookies", "pancakes", "dumplings", "rolls", "scones"])
    need, made, batches = r.randint(2, 5), r.randint(6, 20), r.randint(2, 8)
    eggs = need * batches
    question = r.choice([
        f"{need} eggs are enough for {made} {x}. How many {x} can {p.name} make with {eggs} eggs?",
        f"{p.name} uses {need} eggs to make {made} {x}. {p.name} has {eggs} eggs. How many {x} can {p.he} make?",
        f"One batch of {p.name}'s {x} takes {need} eggs and gives {made} {x}. How many {x} do {eggs} eggs give?",
    ])
    return question, [
        f"The eggs are enough for {calc(f'{eggs}/{need}')} batches.",
        f"That gives {calc(f'{batches}*{made}')} {x}.",
    ], batches * made


# ----------------------------------------------------------------------------------------------------------------
# Three to five steps


def two_kinds_of_shopping(r):
    (p,), ((x, each_x), (y, each_y)) = people(r, 1), r.sample([
        ("loaves of bread", "loaf"), ("jars of honey", "jar"), ("bottles of juice", "bottle"),
        ("bags of rice", "bag"), ("boxes of tea", "box"), ("bars of soap", "bar")], 2)
    a, b, price_x, price_y = r.randint(2, 9), r.randint(2, 9), r.randint(2, 12), r.randint(2, 12)
    cost_x, cost_y = a * price_x, b * price_y
    question = r.choice([
        f"{p.name} buys {a} {x} at ${price_x} each and {b} {y} at ${price_y} each. How much does {p.he} spend?",
        f"A {each_x} of {x.split(' of ')[1]} costs ${price_x} and a {each_y} of {y.split(' of ')[1]} costs ${price_y}. "
        f"What do {a} {x} and {b} {y} cost together?",
        f"At the market {p.name} pays ${price_x} apiece for {a} {x}, and ${price_y} apiece for {b} {y}. "
        f"How many dollars does {p.he} pay altogether?",
    ])
    return question, [
        f"The {x} cost {calc(f'{a}*{price_x}', '$')}.",
        f"The {y} cost {calc(f'{b}*{price_y}', '$')}.",
        f"Together that is {calc(f'{cost_x}+{cost_y}', '$')}.",
    ], cost_x + cost_y


def farm_legs(r):
    (p,), (two, four) = people(r, 1), (r.choice(["chickens", "ducks", "geese"]), r.choice(["sheep", "goats", "cows"]))
    a, b = r.randint(3, 30), r.randint(3, 20)
    legs_a, legs_b = 2 * a, 4 * b
    question = r.choice([
        f"{p.name} keeps {a} {two} and {b} {four}. How many legs do the animals have in all?",
        f"There are {b} {four} and {a} {two} on {p.name}'s farm. How many legs is that altogether?",
        f"In a field {p.name} counts {a} {two} and {b} {four}. How many animal legs are in the field?",
    ])
    return question, [
        f"The {two} have {calc(f'{a}*2')} legs.",
        f"The {four} have {calc(f'{b}*4')} legs.",
        f"Together they have {calc(f'{legs_a}+{legs_b}')} legs.",
    ], legs_a + legs_b


def two_speeds(r):
    (p,), way = people(r, 1), r.choice(["cycles", "rides", "travels", "drives"])
    low, high = (30, 90) if way == "drives" else (8, 25)
    fast, slow, h1, h2 = r.randint(low + 5, high), r.randint(low, low + 4), r.randint(2, 5), r.randint(2, 4)
    first, second = fast * h1, slow * h2
    question = r.choice([
        f"{p.name} {way} for {h1} hours at {fast} kilometers an hour and then for {h2} hours at {slow} kilometers an "
        f"hour. How many kilometers does {p.he} cover?",
        f"For {h1} hours {p.name} {way} at {fast} kilometers per hour. Because of the rain {p.he} then slows down to "
        f"{slow} kilometers per hour for {h2} more hours. How long is the whole way in kilometers?",
        f"{p.name} {way} {fast} kilometers in each of the first {h1} hours, and {slow} kilometers in each of the "
        f"{h2} hours after that. What distance is that in kilometers?",
    ])
    return question, [
        f"The first part is {calc(f'{fast}*{h1}')} kilometers.",
        f"The second part is {calc(f'{slow}*{h2}')} kilometers.",
        f"The whole way is {calc(f'{first}+{second}')} kilometers.",
    ], first + second


def ages(r):
    (p, q) = people(r, 2)
    young, gap, years = r.randint(5, 25), r.randint(2, 15), r.randint(3, 12)
    old = young + gap
    question = r.choice([
        f"{p.name} is {young} years old. {q.name} is {gap} years older than {p.name}. "
        f"What will the sum of their ages be in {years} years?",
        f"{q.name} is {gap} years older than {p.name}, who is {young}. "
        f"How old will the two be together in {years} years?",
        f"{p.name}, who is {young} years old, is {gap} years younger than {q.name}. "
        f"{years} years from now, what do their ages add up to?",
    ])
    return question, [
        f"{q.name} is {calc(f'{young}+{gap}')} years old now.",
        f"In {years} years {p.name} will be {calc(f'{young}+{years}')} and {q.name} {calc(f'{old}+{years}')}.",
        f"The sum is {calc(f'{young + years}+{old + years}')}.",
    ], young + old + 2 * years


def fraction_given_away(r):
    (p, q), x = people(r, 2), r.choice(THINGS)
    word, part = r.choice([("half", 2), ("a third", 3), ("a quarter", 4), ("a fifth", 5)])
    share, more = r.randint(3, 20), r.randint(2, 25)
    total = share * part
    question = r.choice([
        f"{p.name} has {total} {x}. After giving {word} of them to {q.name}, {p.he} buys {more} new ones. "
        f"How many {x} does {p.name} have now?",
        f"{q.name} gets {word} of {p.name}'s {total} {x}. Then {p.name} finds {more} more. "
        f"How many {x} does {p.name} have in the end?",
        f"Of {total} {x}, {p.name} loses {word}. Later {p.he} gets {more} {x} from {q.name}. "
        f"How many {x} does {p.he} have then?",
    ])
    return question, [
        f"{word.capitalize()} of the {x} is {calc(f'{total}/{part}')}.",
        f"That leaves {p.name} {calc(f'{total}-{share}')} {x}.",
        f"In the end there are {calc(f'{total - share}+{more}')} {x}.",
    ], total - share + more


def weekdays_and_weekend(r):
    (p,), what = people(r, 1), r.choice(["practices the piano", "goes running", "studies Spanish", "dances", "swims"])
    a, b = r.randint(2, 12) * 5, r.randint(3, 18) * 5
    week, end = 5 * a, 2 * b
    question = r.choice([
        f"{p.name} {what} for {a} minutes on each of the five weekdays and for {b} minutes on Saturday and on Sunday. "
        f"How many minutes is that in a week?",
        f"From Monday to Friday {p.name} {what} {a} minutes a day, and on both days of the weekend {b} minutes a day. "
        f"How many minutes a week does that make?",
        f"{p.name} {what} every day: {a} minutes on weekdays, {b} minutes on a Saturday or Sunday. "
        f"How many minutes is that in one week?",
    ])
    return question, [
        f"On weekdays it is {calc(f'5*{a}')} minutes.",
        f"On the weekend it is {calc(f'2*{b}')} minutes.",
        f"The week has {calc(f'{week}+{end}')} minutes of it.",
    ], week + end


def fence_cost(r):
    (p,), x = people(r, 1), r.choice(["vegetable patch", "chicken run", "playground", "meadow"])
    long, wide, price = r.randint(6, 40), r.randint(3, 25), r.randint(3, 15)
    if wide >= long:
        raise DoesNotComeOut
    half = long + wide
    question = r.choice([
        f"{p.name} puts a fence around a {x} that is {long} meters long and {wide} meters wide. "
        f"The fence costs ${price} a meter. How much does it cost in all?",
        f"A rectangular {x} measures {long} meters by {wide} meters. "
        f"What does {p.name} pay for a fence around it at ${price} a meter?",
        f"Fencing costs ${price} for each meter. {p.name} needs it for all four sides of a {x}, {long} meters long "
        f"and {wide} meters wide. How many dollars will that be?",
    ])
    return question, [
        f"One long and one short side are {calc(f'{long}+{wide}')} meters.",
        f"The whole fence is {calc(f'2*{half}')} meters.",
        f"It costs {calc(f'{2 * half}*{price}', '$')}.",
    ], 2 * half * price


def three_collectors(r):
    (p, q, s), x = people(r, 3), r.choice(THINGS)
    a, more, (word, times) = r.randint(4, 25), r.randint(2, 15), r.choice([("twice", 2), ("three times", 3)])
    b = times * a
    c = b + more
    question = r.choice([
        f"{p.name} has {a} {x}. {q.name} has {word} as many as {p.name}, and {s.name} has {more} more than {q.name}. "
        f"How many {x} do the three have together?",
        f"{q.name} owns {word} as many {x} as {p.name}. {s.name} owns {more} more than {q.name}. "
        f"If {p.name} owns {a}, how many {x} are there in all?",
        f"{s.name} has {more} {x} more than {q.name}, who has {word} as many as {p.name}. {p.name} has {a} {x}. "
        f"What is the total of all three?",
    ])
    return question, [
        f"{q.name} has {calc(f'{times}*{a}')} {x}.",
        f"{s.name} has {calc(f'{b}+{more}')} {x}.",
        f"Together they have {calc(f'{a}+{b}+{c}')} {x}.",
    ], a + b + c


def bakery_profit(r):
    (p,), x = people(r, 1), r.choice(["buns", "tarts", "cupcakes", "pretzels", "croissants"])
    trays, each, price = r.randint(3, 10), r.randint(6, 20), r.randint(2, 5)
    pieces = trays * each
    income = pieces * price
    cost = r.randint(10, 60)
    question = r.choice([
        f"{p.name} bakes {trays} trays of {each} {x} and sells them all for ${price} each. "
        f"Flour and butter cost {p.name} ${cost}. How much money does {p.he} make after paying for them?",
        f"{p.name} spends ${cost} on ingredients, bakes {trays} trays with {each} {x} each and sells every one for "
        f"${price}. What is {p.his} profit in dollars?",
        f"At a fair {p.name} sells {trays} trays of {x} at ${price} apiece. There are {each} on a tray, "
        f"and the stall costs ${cost}. How many dollars remain for {p.name}?",
    ])
    return question, [
        f"There are {calc(f'{trays}*{each}')} {x}.",
        f"They bring in {calc(f'{pieces}*{price}', '$')}.",
        f"{p.name} is left with {calc(f'{income}-{cost}', '$')}.",
    ], income - cost


def theater_tickets(r):
    what, low = r.choice([("theater", 8), ("circus", 8), ("zoo", 5), ("aquarium", 6)])
    grown, kids = r.randint(2, 30), r.randint(2, 40)
    child = r.randint(3, 9)
    adult = child + r.randint(low - 3, 12)
    for_grown, for_kids = grown * adult, kids * child
    question = r.choice([
        f"Tickets for the {what} cost ${adult} for adults and ${child} for children. "
        f"How much do {grown} adults and {kids} children pay together?",
        f"The {what} sold {grown} adult tickets at ${adult} and {kids} child tickets at ${child}. "
        f"How many dollars did it take in?",
        f"A group of {kids} children and {grown} adults visits the {what}. A child pays ${child}, an adult ${adult}. "
        f"What do the tickets cost in all?",
    ])
    return question, [
        f"The adults pay {calc(f'{grown}*{adult}', '$')}.",
        f"The children pay {calc(f'{kids}*{child}', '$')}.",
        f"In all it is {calc(f'{for_grown}+{for_kids}', '$')}.",
    ], for_grown + for_kids


def eggs_by_the_dozen(r):
    (p,) = people(r, 1)
    hens, price = r.choice([12, 24, 36, 48, 60]), r.randint(2, 6)
    days = r.randint(3, 14)
    eggs = hens * days
    dozens = eggs // 12
    question = r.choice([
        f"Each of {p.name}'s {hens} hens lays an egg every day. {p.name} sells the eggs at ${price} a dozen. "
        f"How much does {p.he} earn in {days} days?",
        f"{p.name} has {hens} hens that lay one egg a day each. A dozen eggs sells for ${price}. "
        f"How many dollars do the eggs of {days} days bring?",
        f"A dozen eggs costs ${price}. How many dollars does {p.name} get for the eggs that {hens} hens lay in "
        f"{days} days if every hen lays one a day?",
    ])
    return question, [
        f"The hens lay {calc(f'{hens}*{days}')} eggs.",
        f"That is {calc(f'{eggs}/12')} dozen.",
        f"{p.name} gets {calc(f'{dozens}*{price}', '$')}.",
    ], dozens * price


def club_supplies(r):
    (p,), (x, y) = people(r, 1), r.sample(["folders", "rulers", "brushes", "erasers", "markers", "glue sticks"], 2)
    a, b, price_x, price_y = r.randint(2, 8), r.randint(2, 8), r.randint(2, 6), r.randint(2, 6)
    friends, coupon = r.randint(2, 5), r.randint(2, 10)
    cost_x, cost_y = a * price_x, b * price_y
    total = cost_x + cost_y
    if (total - coupon) % friends:
        raise DoesNotComeOut
    question = r.choice([
        f"{friends} friends buy {a} {x} at ${price_x} each and {b} {y} at ${price_y} each for a club. They use a "
        f"coupon for ${coupon} off and share the rest of the cost equally. How much does each friend pay?",
        f"{p.name}'s club needs {a} {x} for ${price_x} apiece and {b} {y} for ${price_y} apiece. The club has "
        f"${coupon}, and the {friends} members split the rest of the bill evenly. How many dollars does each pay?",
        f"{a} {x} cost ${price_x} each, and {b} {y} cost ${price_y} each. {p.name} gives ${coupon} towards them, and "
        f"{friends} classes pay the rest in equal parts. What does one class pay?",
    ])
    return question, [
        f"The {x} cost {calc(f'{a}*{price_x}', '$')} and the {y} {calc(f'{b}*{price_y}', '$')}.",
        f"Together that is {calc(f'{cost_x}+{cost_y}', '$')}.",
        f"The rest is {calc(f'{total}-{coupon}', '$')}.",
        f"Each pays {calc(f'{total - coupon}/{friends}', '$')}.",
    ], (total - coupon) // friends


def delivery_rounds(r):
    (p,), x = people(r, 1), r.choice(["parcels", "newspapers", "pizzas", "letters"])
    morning, evening, days, week = r.randint(5, 30), r.randint(3, 25), r.randint(2, 6), r.randint(2, 4)
    daily = morning + evening
    weekly = daily * days
    question = r.choice([
        f"{p.name} delivers {morning} {x} every morning and {evening} every evening, {days} days a week. "
        f"How many {x} does {p.he} deliver in {week} weeks?",
        f"On each of {days} working days a week {p.name} takes out {morning} {x} before noon and {evening} after noon. "
        f"How many {x} is that in {week} weeks?",
    ])
    return question, [
        f"In a day it is {calc(f'{morning}+{evening}')} {x}.",
        f"In a week it is {calc(f'{daily}*{days}')} {x}.",
        f"In {week} weeks it is {calc(f'{weekly}*{week}')} {x}.",
    ], weekly * week


TRAIN_FAMILIES = [
    # one step
    two_piles, gave_some_away, full_packs, share_equally, how_many_more,
    # two steps
    twice_as_many_pages, change_from_a_note, saving_for_something, weekly_wage, garden_rows, bus_stops,
    shelves_and_a_pile, groups_of_a_class, filling_a_tank, pages_left, boxes_of_tiles, monthly_plan, discount,
    cookies_per_batch,
    # three to five
    two_kinds_of_shopping, farm_legs, two_speeds, ages, fraction_given_away, weekdays_and_weekend, fence_cost,
    three_collectors, bakery_profit, theater_tickets, eggs_by_the_dozen, club_supplies, delivery_rounds,
]  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------
# Families of the test file only


def average_score(r):
    (p,), game = people(r, 1), r.choice(["darts", "bowling", "quiz", "spelling"])
    a, b, c = r.randint(20, 90), r.randint(20, 90), r.randint(20, 90)
    total = a + b + c
    question = r.choice([
        f"In three {game} rounds {p.name} scores {a}, {b} and {c} points. What is {p.his} average score?",
        f"{p.name}'s results in three {game} rounds are {a}, {b} and {c}. "
        f"How many points is that per round on average?",
    ])
    return question, [
        f"In all {p.name} scores {calc(f'{a}+{b}+{c}')} points.",
        f"The average is {calc(f'{total}/3')} points.",
    ], total // 3


def two_machines(r):
    x = r.choice(["labels", "posters", "envelopes", "bottles", "screws"])
    a, b, minutes = r.randint(4, 30), r.randint(3, 25), r.randint(3, 20)
    both = a + b
    total = both * minutes
    question = r.choice([
        f"One machine makes {a} {x} a minute and another one makes {b} a minute. "
        f"How many minutes do they need for {total} {x} when both run?",
        f"A workshop must make {total} {x}. Its two machines make {a} and {b} {x} a minute. "
        f"If both work all the time, how many minutes does it take?",
    ])
    return question, [
        f"Together they make {calc(f'{a}+{b}')} {x} a minute.",
        f"They need {calc(f'{total}/{both}')} minutes.",
    ], minutes


def paying_back_a_loan(r):
    (p, q) = people(r, 2)
    monthly, months, first = r.randint(10, 60), r.randint(3, 15), r.randint(20, 100)
    rest = monthly * months
    loan = rest + first
    question = r.choice([
        f"{p.name} borrows ${loan} from {q.name}. {p.name} returns ${first} at once and ${monthly} every month. "
        f"After how many months is everything paid back?",
        f"{p.name} owes {q.name} ${loan}. After a first payment of ${first}, {p.he} pays ${monthly} a month. "
        f"How many months does {p.he} pay until nothing is owed?",
    ])
    return question, [
        f"After the first payment {p.name} owes {calc(f'{loan}-{first}', '$')}.",
        f"Paying it back takes {calc(f'{rest}/{monthly}')} months.",
    ], months


def burning_candle(r):
    hours, rate, evenings = r.randint(2, 4), r.randint(2, 4), r.randint(2, 5)
    daily = hours * rate
    gone = daily * evenings
    length = gone + r.randint(2, 20)
    question = r.choice([
        f"A candle is {length} centimeters tall and becomes {rate} centimeters shorter in every hour that it burns. "
        f"It burns for {hours} hours on each of {evenings} evenings. How many centimeters of it are left?",
        f"On {evenings} evenings a candle of {length} centimeters burns for {hours} hours each. "
        f"Every hour makes it {rate} centimeters shorter. How tall is it afterwards, in centimeters?",
    ])
    return question, [
        f"In one evening {calc(f'{hours}*{rate}')} centimeters burn.",
        f"In {evenings} evenings it is {calc(f'{daily}*{evenings}')} centimeters.",
        f"What is left is {calc(f'{length}-{gone}')} centimeters.",
    ], length - gone


def climbing_a_tower(r):
    (p,), x = people(r, 1), r.choice(["lighthouse", "bell tower", "lookout tower", "castle tower"])
    floors, steps, rest = r.randint(3, 12), r.randint(10, 30), r.randint(5, 60)
    total = floors * steps
    question = r.choice([
        f"A {x} has {floors} floors with {steps} steps to each. {p.name} has climbed {rest} steps. "
        f"How many steps remain to the top?",
        f"It takes {steps} steps to climb each of the {floors} floors of a {x}. "
        f"After {rest} steps {p.name} takes a break. How many steps does {p.he} still have to climb?",
    ])
    return question, [
        f"The {x} has {calc(f'{floors}*{steps}')} steps.",
        f"There remain {calc(f'{total}-{rest}')} steps.",
    ], total - rest


def how_many_at_first(r):
    (p, q), x = people(r, 2), r.choice(["photos", "cards", "balloons", "walnuts"])
    left, lost = r.randint(3, 30), r.randint(2, 20)
    half = left + lost
    question = r.choice([
        f"{p.name} gave half of {p.his} {x} to {q.name} and then lost {lost} of the rest. Now {p.he} has {left} {x}. "
        f"How many did {p.he} have at first?",
        f"Half of the {x} in a box went to {q.name}. Of the other half {p.name} used {lost}, and {left} are left. "
        f"How many {x} were in the box in the beginning?",
    ])
    return question, [
        f"Before the last {lost} were gone there were {calc(f'{left}+{lost}')} {x}.",
        f"That was half, so at first there were {calc(f'{half}*2')} {x}.",
    ], 2 * half


TEST_ONLY_FAMILIES = [
    average_score, two_machines, paying_back_a_loan, burning_candle, climbing_a_tower, how_many_at_first,
]  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------
# Records and files

_ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")


def make_record(family, r):
    """One record of a family; draws until the numbers come out."""
    while True:
        try:
            question, lines, answer = family(r)
            break
        except DoesNotComeOut:
            continue
    record = {"instruction": question, "output": "\n".join([*lines, f"#### {answer}"]), "family": family.__name__}
    check(record)
    return record


def check(record):
    """Every annotation is true, each is followed by its result, and the last one is the answer."""
    body, answer = record["output"].split("\n#### ")
    annotations = _ANNOTATION.findall(body)
    for expression, result in annotations:
        assert evaluate(expression) == int(result), record
        assert f"{expression}={result}>>{result}" in body, record
    assert annotations and annotations[-1][1] == answer, record


def numbers_of(record):
    """Equal for two problems that are the same sum in other words: the family and all numbers calculated with."""
    numbers = re.findall(r"\d+", " ".join("=".join(pair) for pair in _ANNOTATION.findall(record["output"])))
    return record["family"], tuple(sorted(numbers))


def draw(families, n, r, *, avoid):
    """n records, the families in turn, shuffled; no question twice, and no sum that the records of `avoid` have."""
    questions, numbers = set(), {numbers_of(record) for record in avoid}
    records = []
    while len(records) < n:
        record = make_record(families[len(records) % len(families)], r)
        if record["instruction"] in questions or numbers_of(record) in numbers:
            continue
        questions.add(record["instruction"])
        records.append(record)
    r.shuffle(records)
    return records


def make_dataset(seed=SEED):
    """(train records, test records)"""
    r = random.Random(seed)
    train = draw(TRAIN_FAMILIES, N_TRAIN, r, avoid=[])
    test = draw(TRAIN_FAMILIES, N_TEST_SEEN, r, avoid=train) + draw(TEST_ONLY_FAMILIES, N_TEST_UNSEEN, r, avoid=[])
    r.shuffle(test)  # so that the first n of the file are a fair sample
    return train, test


def as_json(records):
    """A JSON list with one record per line, so that a diff shows the records that changed."""
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n"


def main():
    parser = argparse.ArgumentParser(description="Regenerate train.json and test.json.")
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).parent, help="default: beside this script")
    out_dir = parser.parse_args().out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, records in zip(("train.json", "test.json"), make_dataset()):
        (out_dir / name).write_text(as_json(records), encoding="utf-8", newline="\n")
        print(f"{out_dir / name}: {len(records)} records")


if __name__ == "__main__":
    main()

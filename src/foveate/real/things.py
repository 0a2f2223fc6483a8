"""Things that scenes show: their names in plain English, how a name is put into a question, and which names do not go together.

The table lists what can be told apart in a picture of 40 pixels. An entry is a name, or `label>name` where the emoji of that name has
another label in Unicode's list, with a mark at its end: `~` for what is not counted ("bread"), `+` for a plural ("grapes"), neither of
which is asked for in numbers. Names without an emoji are those of photographs.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

TABLE = {
    "mammal": """monkey, gorilla, orangutan, dog, wolf, fox, raccoon, cat, lion, tiger, leopard, moose, donkey, horse, unicorn, zebra, deer,
        bison, cow, pig, boar, ram, ewe>sheep, goat, camel, llama, giraffe, elephant, rhinoceros, hippopotamus, mouse, hamster, rabbit,
        chipmunk, beaver, hedgehog, bat, bear, polar bear, koala, panda, sloth, otter, skunk, kangaroo, badger, squirrel, yak, ferret,
        wombat, marmot, dingo""",
    "bird": """turkey, rooster, baby chick>chick, penguin, dove, eagle, duck, swan, owl, dodo, flamingo, peacock, parrot, goose, crow,
        ostrich, pelican, vulture, seagull, toucan, magpie, quetzal""",
    "sea animal": """whale, dolphin, orca, seal, tropical fish>fish, blowfish>pufferfish, shark, octopus, spiral shell>shell, jellyfish,
        crab, lobster, shrimp, squid, oyster, coral~, frog, crocodile, turtle, seahorse, clownfish""",
    "small animal": """snail, butterfly, ant, honeybee>bee, beetle, lady beetle>ladybug, cricket, cockroach, spider, scorpion, mosquito,
        fly, worm, lizard, snake, grasshopper, hornet, mantis, slug, iguana""",
    "plant": """bouquet, cherry blossom, lotus, rose, hibiscus, sunflower, tulip, hyacinth, evergreen tree>pine tree, palm tree, cactus,
        shamrock, maple leaf, mushroom, potted plant, seedling, daffodil, iris, pinecone""",
    "fruit": """grapes+, melon, watermelon, tangerine>orange, lemon, lime, banana, pineapple, mango, red apple, green apple, pear, peach,
        cherries+, strawberry, blueberries+, kiwi fruit>kiwi, tomato, olive, coconut, apricot, raspberry, pomegranate""",
    "vegetable": """avocado, eggplant, potato, carrot, ear of corn>corn~, hot pepper>chili pepper, bell pepper, cucumber, broccoli~,
        garlic~, onion, peanuts+, beans+, chestnut, pea pod, almond, pecan, walnut""",
    "meal": """bread~, croissant, baguette bread>baguette, pretzel, bagel, pancakes+, waffle, cheese wedge>cheese~, bacon~, hamburger,
        french fries>fries+, pizza, hot dog, sandwich, taco, burrito, egg, popcorn~, butter~, poultry leg>chicken leg, green salad>salad,
        rice ball, sushi~, spaghetti~, dumpling, bento box, fried shrimp""",
    "sweet": """ice cream, doughnut, cookie, birthday cake, cupcake, pie, chocolate bar, candy, lollipop, honey pot>honey~,
        fortune cookie""",
    "kitchen": """baby bottle, glass of milk>milk~, teapot, wine glass, cocktail glass>cocktail, beer mug, bubble tea~, chopsticks+, spoon,
        kitchen knife>knife, jar, amphora>vase, mug, kettle, nutcracker""",
    "place": """volcano, house, castle, church, mosque, hospital, school, factory, stadium, tent, fountain, ferris wheel, roller coaster,
        carousel horse>carousel, Statue of Liberty, hut, bank, hotel""",
    "vehicle": """locomotive, tram, bus, ambulance, fire engine>fire truck, police car, taxi, automobile>car, pickup truck,
        delivery truck>truck, tractor, racing car>race car, motorcycle, motor scooter>scooter, bicycle, skateboard, roller skate, sailboat,
        canoe, speedboat, ship, airplane, helicopter, parachute, rocket, flying saucer>UFO, satellite, manual wheelchair>wheelchair, metro,
        bullet train, sled, mountain cableway>cable car, sports car, garbage truck, hot air balloon""",
    "street": "anchor, fuel pump>gas pump, stop sign, vertical traffic light>traffic light, bus stop, postbox>mailbox, wheel",
    "sky": """sun, star, cloud, rainbow, umbrella, snowflake, snowman, tornado, fire~, comet, high voltage>lightning bolt, crescent moon,
        droplet>drop, ringed planet>planet, water wave>wave, full moon""",
    "sport": """soccer ball, baseball, basketball, volleyball, american football>football, boxing glove, ice skate, fishing pole,
        flying disc>frisbee, skis+, curling stone, trophy, bullseye>target, yo-yo, kite, water pistol>water gun, crystal ball, magic wand,
        joystick, game die>die, puzzle piece, teddy bear, chess pawn>pawn, slot machine, balloon, jack-o-lantern, Christmas tree,
        wrapped gift>gift, ticket, firecracker, tennis ball, cricket ball, tennis racket""",
    "clothing": """glasses+, sunglasses+, goggles+, necktie>tie, t-shirt>shirt, jeans+, scarf, gloves+, coat, socks+, dress, kimono,
        shorts+, bikini, handbag, backpack, running shoe>sneaker, hiking boot>boot, high-heeled shoe>high heel, crown, top hat,
        graduation cap, billed cap>cap, lipstick~, ring, gem stone>diamond, sombrero""",
    "music": """bell, megaphone, saxophone, trumpet, accordion, guitar, musical keyboard>piano, violin, banjo, drum, maracas+, flute, harp,
        headphone>headphones+, microphone, radio, cello, bassoon""",
    "device": """battery, laptop, printer, keyboard, computer mouse, floppy disk, telephone, mobile phone, television, camera, light bulb,
        candle, flashlight, magnifying glass tilted left>magnifying glass, red paper lantern>lantern, film projector>projector,
        movie camera, microscope, telescope, watch, alarm clock, stopwatch, hourglass done>hourglass, compass""",
    "office": """artist palette>palette, framed picture>painting, closed book>book, scroll, newspaper, envelope, package, pencil,
        fountain pen, pen, paintbrush, crayon, briefcase, calendar, pushpin, paperclip, scissors+, clipboard, wastebasket>trash can, key,
        locked>padlock, money bag, coin, credit card, treasure chest, luggage>suitcase, straight ruler>ruler""",
    "tool": """hammer, axe, pick>pickaxe, crossed swords>swords+, dagger, bomb, boomerang, bow and arrow, shield, carpentry saw>saw, wrench,
        screwdriver, gear, hook, toolbox, magnet, ladder, shovel, chains>chain, balance scale>scale, yarn~, thread~, spade""",
    "household": """door, bed, chair, toilet, bathtub, razor, broom, basket, bucket, soap~, toothbrush, sponge, fire extinguisher,
        shopping cart, test tube, syringe, pill, stethoscope, adhesive bandage>bandage, dna>DNA~, coffin, plunger, mirror, window,
        safety pin, mouse trap, roll of paper>toilet paper~, lotion bottle, button, tooth""",
}

SYNONYMS = """airplane = plane; alarm clock = clock; bandage = band-aid, plaster; bell pepper = pepper, green pepper; bicycle = bike;
    bullet train = train;  car = automobile; chili pepper = hot pepper, pepper; die = dice; doughnut = donut;
    eggplant = aubergine; fire truck = fire engine, firetruck; fries = french fries; frisbee = flying disc; gift = present;
    glasses = eyeglasses; hamburger = burger; high heel = shoe; hippopotamus = hippo; jack-o-lantern = pumpkin; kiwi = kiwi fruit;
    ladybug = ladybird; light bulb = lightbulb, bulb; lightning bolt = lightning; locomotive = train, steam train; metro = train, subway;
    mobile phone = phone, cell phone, smartphone; motorcycle = motorbike; orange = tangerine; orca = killer whale; padlock = lock;
    painting = framed picture; pine tree = evergreen tree, fir tree; race car = racing car; rhinoceros = rhino; rooster = cock, chicken;
    scale = balance; shirt = t-shirt; sneaker = running shoe, shoe; soccer ball = football; suitcase = luggage; swords = crossed swords;
    target = bullseye, dartboard; telephone = phone; television = tv; tie = necktie; trash can = wastebasket; UFO = flying saucer"""
"""Other names that are as right an answer."""

KIN = """dog, wolf, fox, dingo; cow, bison, yak; mouse, hamster, computer mouse, mouse trap; pig, boar; deer, moose; cat, leopard;
    goat, ram, sheep; chick, rooster; lemon, lime; car, taxi, police car, race car, sports car; truck, fire truck, pickup truck,
    garbage truck; ship, speedboat, sailboat; locomotive, tram, metro, bullet train; telephone, mobile phone; football, soccer
    ball; melon, watermelon; fish, pufferfish, clownfish; balloon, hot air balloon; glasses, sunglasses, goggles; guitar, banjo,
    violin, cello; cap, graduation cap; watch, stopwatch, alarm clock; knife, dagger, swords; keyboard, piano; star, crescent
    moon, full moon; squirrel, chipmunk, marmot; dove, seagull, goose, swan, duck; crab, lobster, shrimp, fried shrimp; door,
    window; gloves, boxing glove; shovel, spade; pen, fountain pen, pencil; bell, drum; birthday cake, cupcake; castle, hut,
    house, hotel, bank, school, hospital, factory; sun, rainbow; whale, dolphin, orca; bee, hornet, fly; beetle, cricket,
    cockroach; palm tree, pine tree, Christmas tree; rose, tulip, hibiscus, bouquet; jar, vase; mug, beer mug"""
"""Sets of names of things that one could be taken for or called by: none is asked for as absent where another is there."""

_MICE = """mouse = mice; computer mouse = computer mice; goose = geese; wolf = wolves; knife = knives; maple leaf = maple leaves; sheep =
    sheep; deer = deer; moose = moose; bison = bison; fish = fish; pufferfish = pufferfish; clownfish = clownfish;
    shrimp = shrimp; fried shrimp = fried shrimp; squid = squid; die = dice; tooth = teeth; potato = potatoes; tomato = tomatoes; mango
    = mangoes; mosquito = mosquitoes; volcano = volcanoes; tornado = tornadoes; bow and arrow = bows and arrows; Statue of Liberty =
    Statues of Liberty; scarf = scarves; snowman = snowmen; jellyfish = jellyfish"""


@dataclass(frozen=True)
class Name:
    """What a thing is called. `label` is that of its emoji; `group` holds what is like it; `number` is "one", "mass" or "plural"."""

    name: str
    label: str
    group: str
    number: str = "one"

    @property
    def some(self) -> str:
        """With its article: "a lemon", "bread", "grapes"."""
        if self.number != "one":
            return self.name
        return f"{'an' if (self.name[0] in 'aeiou' and self.name != 'unicorn') or self.name == 'hourglass' else 'a'} {self.name}"

    @property
    def many(self) -> str:
        """The plural of what can be counted."""
        if self.name in (irregular := pairs(_MICE)):
            return irregular[self.name]
        if self.name.endswith("y") and self.name[-2] not in "aeiou":
            return self.name[:-1] + "ies"
        return self.name + ("es" if self.name.endswith(("s", "x", "z", "ch", "sh")) else "s")

    @property
    def said(self) -> tuple[str, ...]:
        """Right answers: the name, and others for the same."""
        return (self.name, *filter(None, pairs(SYNONYMS).get(self.name, "").split(", ")))


@functools.cache
def names() -> dict[str, Name]:
    """All names of the table."""
    found = {}
    for group, entries in TABLE.items():
        for entry in entries.split(","):
            text = " ".join(entry.split())
            number = {"~": "mass", "+": "plural"}.get(text[-1], "one")
            label, _, name = text.rstrip("~+").partition(">")
            found[name or label] = Name(name or label, label, group, number)
    return found


@functools.cache
def pairs(text: str) -> dict[str, str]:
    """Of "a = b; c = d"."""
    return dict(entry.split(" = ") for entry in " ".join(text.split()).split("; "))


def hashed(text: str) -> int:
    """A number that depends on the text alone, whatever seed, machine or day."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


def held_out(members: Iterable[str], share: int, least: int = 2) -> set[str]:
    """One of `share` of the texts, at least `least`: those that no training picture shows."""
    ordered = sorted(members, key=hashed)
    return set(ordered[: max(least, len(ordered) // share)])


def held_pair(one: str, other: str) -> bool:
    """Whether two names are never together in a training scene: one pair of ten."""
    return hashed("|".join(sorted((one, other)))) % 10 == 0


def akin(one: str, other: str) -> bool:
    """Whether one thing could be called by the other's name."""
    return one == other or other in _kin().get(one, ())


@functools.cache
def _kin() -> dict[str, set[str]]:
    """Names that share a word or a right answer, or stand in one set of `KIN`."""
    sets = [set(line.split(", ")) for line in " ".join(KIN.split()).split("; ")]
    shared: dict[str, set[str]] = {}
    for name in names().values():
        for mark in {*name.name.split(), *(f"={said}" for said in name.said)}:
            shared.setdefault(mark, set()).add(name.name)
    found: dict[str, set[str]] = {}
    for alike in (*sets, *shared.values()):
        for name in alike:
            found.setdefault(name, set()).update(alike)
    return found

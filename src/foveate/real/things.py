"""Things that scenes show: their names in plain English, how a name is put into a question, and which names do not go together.

The table lists what can be told apart in a picture of 40 pixels. An entry is a name with its emoji, or without one if there are only
photographs of it. A mark at its end says that it is not asked for in numbers: `~` that it is not counted ("bread"), `+` that it is a plural
("grapes").
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

TABLE = {
    "mammal": """🐒 monkey, 🦍 gorilla, 🦧 orangutan, 🐕 dog, 🐺 wolf, 🦊 fox, 🦝 raccoon, 🐈 cat, 🦁 lion, 🐅 tiger, 🐆 leopard,
        🫎 moose, 🫏 donkey, 🐎 horse, 🦄 unicorn, 🦓 zebra, 🦌 deer, 🦬 bison, 🐄 cow, 🐖 pig, 🐗 boar, 🐏 ram, 🐑 sheep, 🐐 goat,
        🐪 camel, 🦙 llama, 🦒 giraffe, 🐘 elephant, 🦏 rhinoceros, 🦛 hippopotamus, 🐁 mouse, 🐹 hamster, 🐇 rabbit, 🐿 chipmunk,
        🦫 beaver, 🦔 hedgehog, 🦇 bat, 🐻 bear, 🐨 koala, 🐼 panda, 🦥 sloth, 🦦 otter, 🦨 skunk, 🦘 kangaroo,
        🦡 badger, squirrel, yak, ferret, wombat, marmot, dingo""",
    "bird": """🦃 turkey, 🐓 rooster, 🐤 chick, 🐧 penguin, 🕊 dove, 🦅 eagle, 🦆 duck, 🦢 swan, 🦉 owl, 🦤 dodo, 🦩 flamingo,
        🦚 peacock, 🦜 parrot, 🪿 goose, crow, ostrich, pelican, vulture, seagull, toucan, magpie, quetzal""",
    "sea animal": """🐋 whale, 🐬 dolphin, 🫍 orca, 🦭 seal, 🐠 fish, 🐡 pufferfish, 🦈 shark, 🐙 octopus, 🐚 shell, 🪼 jellyfish,
        🦀 crab, 🦞 lobster, 🦐 shrimp, 🦑 squid, 🦪 oyster, 🪸 coral~, 🐸 frog, 🐊 crocodile, 🐢 turtle, seahorse, clownfish""",
    "small animal": """🐌 snail, 🦋 butterfly, 🐜 ant, 🐝 bee, 🪲 beetle, 🐞 ladybug, 🦗 cricket, 🪳 cockroach, 🕷 spider,
        🦂 scorpion, 🦟 mosquito, 🪰 fly, 🪱 worm, 🦎 lizard, 🐍 snake, grasshopper, hornet, mantis, slug, iguana""",
    "plant": """💐 bouquet, 🌸 cherry blossom, 🪷 lotus, 🌹 rose, 🌺 hibiscus, 🌻 sunflower, 🌷 tulip, 🪻 hyacinth, 🌲 pine tree,
        🌴 palm tree, 🌵 cactus, ☘ shamrock, 🍁 maple leaf, 🍄 mushroom, 🪴 potted plant, 🌱 seedling, daffodil, iris, pinecone""",
    "fruit": """🍇 grapes+, 🍈 melon, 🍉 watermelon, 🍊 orange, 🍋 lemon, 🍌 banana, 🍍 pineapple, 🥭 mango,
        🍎 red apple, 🍏 green apple, 🍐 pear, 🍑 peach, 🍒 cherries+, 🍓 strawberry, 🫐 blueberries+, 🥝 kiwi, 🍅 tomato, 🫒 olive,
        🥥 coconut, apricot, raspberry, pomegranate""",
    "vegetable": """🥑 avocado, 🍆 eggplant, 🥔 potato, 🥕 carrot, 🌽 corn~, 🌶 chili pepper, 🫑 bell pepper, 🥒 cucumber,
        🥦 broccoli~, 🧄 garlic~, 🧅 onion, 🥜 peanuts+, 🫘 beans+, 🌰 chestnut, 🫛 pea pod, almond, pecan, walnut""",
    "meal": """🍞 bread~, 🥐 croissant, 🥖 baguette, 🥨 pretzel, 🥯 bagel, 🥞 pancakes+, 🧇 waffle, 🧀 cheese~, 🥓 bacon~,
        🍔 hamburger, 🍟 fries+, 🍕 pizza, 🌭 hot dog, 🥪 sandwich, 🌮 taco, 🌯 burrito, 🥚 egg, 🍿 popcorn~, 🧈 butter~,
        🍗 chicken leg, 🥗 salad, 🍙 rice ball, 🍣 sushi~, 🍝 spaghetti~, 🥟 dumpling, 🍱 bento box, 🍤 fried shrimp""",
    "sweet": """🍨 ice cream, 🍩 doughnut, 🍪 cookie, 🎂 birthday cake, 🧁 cupcake, 🥧 pie, 🍫 chocolate bar, 🍬 candy, 🍭 lollipop,
        🍯 honey~, 🥠 fortune cookie""",
    "kitchen": """🍼 baby bottle, 🥛 milk~, 🫖 teapot, 🍷 wine glass, 🍸 cocktail, 🍺 beer mug, 🧋 bubble tea~, 🥢 chopsticks+,
        🥄 spoon, 🔪 knife, 🫙 jar, 🏺 vase, mug, kettle, nutcracker""",
    "place": """🌋 volcano, 🏠 house, 🏰 castle, ⛪ church, 🕌 mosque, 🏥 hospital, 🏫 school, 🏭 factory, 🏟 stadium, ⛺ tent,
        ⛲ fountain, 🎡 ferris wheel, 🎢 roller coaster, 🎠 carousel, 🗽 Statue of Liberty, 🛖 hut, 🏦 bank, 🏨 hotel""",
    "vehicle": """🚂 locomotive, 🚊 tram, 🚌 bus, 🚑 ambulance, 🚒 fire truck, 🚓 police car, 🚕 taxi, 🚗 car, 🛻 pickup truck,
        🚚 truck, 🚜 tractor, 🏎 race car, 🏍 motorcycle, 🛵 scooter, 🚲 bicycle, 🛹 skateboard, 🛼 roller skate, ⛵ sailboat,
        🛶 canoe, 🚤 speedboat, 🚢 ship, ✈ airplane, 🚁 helicopter, 🪂 parachute, 🚀 rocket, 🛸 UFO, 🛰 satellite, 🦽 wheelchair,
        🚇 metro, 🚅 bullet train, 🛷 sled, 🚠 cable car, sports car, garbage truck, hot air balloon""",
    "street": """⚓ anchor, ⛽ gas pump, 🛑 stop sign, 🚦 traffic light, 🚏 bus stop, 📮 mailbox, 🛞 wheel""",
    "sky": """☀ sun, ⭐ star, ☁ cloud, 🌈 rainbow, ☂ umbrella, ❄ snowflake, ☃ snowman, 🌪 tornado, 🔥 fire~, ☄ comet,
        ⚡ lightning bolt, 🌙 crescent moon, 💧 drop, 🪐 planet, 🌊 wave, 🌕 full moon""",
    "sport": """⚽ soccer ball, ⚾ baseball, 🏀 basketball, 🏐 volleyball, 🏈 football, 🥊 boxing glove, ⛸ ice skate,
        🎣 fishing pole, 🥏 frisbee, 🎿 skis+, 🥌 curling stone, 🏆 trophy, 🎯 target, 🪀 yo-yo, 🪁 kite, 🔫 water gun,
        🔮 crystal ball, 🪄 magic wand, 🕹 joystick, 🎲 die, 🧩 puzzle piece, 🧸 teddy bear, ♟ pawn, 🎰 slot machine, 🎈 balloon,
        🎃 jack-o-lantern, 🎄 Christmas tree, 🎁 gift, 🎫 ticket, 🧨 firecracker, tennis ball, cricket ball, tennis racket""",
    "clothing": """👓 glasses+, 🕶 sunglasses+, 🥽 goggles+, 👔 tie, 👕 shirt, 👖 jeans+, 🧣 scarf, 🧤 gloves+, 🧥 coat, 🧦 socks+,
        👗 dress, 👘 kimono, 🩳 shorts+, 👙 bikini, 👜 handbag, 🎒 backpack, 👟 sneaker, 🥾 boot, 👠 high heel, 👑 crown,
        🎩 top hat, 🎓 graduation cap, 🧢 cap, 💄 lipstick~, 💍 ring, 💎 diamond, sombrero""",
    "music": """🔔 bell, 📣 megaphone, 🎷 saxophone, 🎺 trumpet, 🪗 accordion, 🎸 guitar, 🎹 piano, 🎻 violin, 🪕 banjo, 🥁 drum,
        🪇 maracas+, 🪈 flute, 🪉 harp, 🎧 headphones+, 🎤 microphone, 📻 radio, cello, bassoon""",
    "device": """🔋 battery, 💻 laptop, 🖨 printer, ⌨ keyboard, 🖱 computer mouse, 💾 floppy disk, ☎ telephone, 📱 mobile phone,
        📺 television, 📷 camera, 💡 light bulb, 🕯 candle, 🔦 flashlight, 🔍 magnifying glass, 🏮 lantern, 📽 projector,
        🎥 movie camera, 🔬 microscope, 🔭 telescope, ⌚ watch, ⏰ alarm clock, ⏱ stopwatch, ⌛ hourglass, 🧭 compass""",
    "office": """🎨 palette, 🖼 painting, 📕 book, 📜 scroll, 📰 newspaper, ✉ envelope, 📦 package, ✏ pencil, 🖋 fountain pen, 🖊 pen,
        🖌 paintbrush, 🖍 crayon, 💼 briefcase, 📅 calendar, 📌 pushpin, 📎 paperclip, ✂ scissors+, 📋 clipboard, 🗑 trash can, 🔑 key,
        🔒 padlock, 💰 money bag, 🪙 coin, 💳 credit card, 🪎 treasure chest, 🧳 suitcase, 📏 ruler""",
    "tool": """🔨 hammer, 🪓 axe, ⛏ pickaxe, ⚔ swords+, 🗡 dagger, 💣 bomb, 🪃 boomerang, 🏹 bow and arrow, 🛡 shield, 🪚 saw,
        🔧 wrench, 🪛 screwdriver, ⚙ gear, 🪝 hook, 🧰 toolbox, 🧲 magnet, 🪜 ladder, 🪏 shovel, ⛓ chain, ⚖ scale, 🧶 yarn~,
        🧵 thread~, spade""",
    "household": """🚪 door, 🛏 bed, 🪑 chair, 🚽 toilet, 🛁 bathtub, 🪒 razor, 🧹 broom, 🧺 basket, 🪣 bucket, 🧼 soap~,
        🪥 toothbrush, 🧽 sponge, 🧯 fire extinguisher, 🛒 shopping cart, 🧪 test tube, 💉 syringe, 💊 pill, 🩺 stethoscope,
        🩹 bandage, 🧬 DNA~, ⚰ coffin, 🪠 plunger, 🪞 mirror, 🪟 window, 🧷 safety pin, 🪤 mouse trap, 🧻 toilet paper~,
        🧴 lotion bottle, button, 🦷 tooth""",
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
    goat, ram, sheep; chick, rooster; car, taxi, police car, race car, sports car; truck, fire truck, pickup truck,
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
    """What a thing is called. `group` holds what is like it; `number` is "one", "mass" or "plural"; `emoji` is one character, or ""."""

    name: str
    group: str
    emoji: str = ""
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
            emoji, name = ("", text.rstrip("~+")) if text.isascii() else text.rstrip("~+").split(" ", 1)
            found[name] = Name(name, group, emoji, number)
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
        for mark in {*name.name.split(), *(f"={right}" for right in name.said)}:
            shared.setdefault(mark, set()).add(name.name)
    found: dict[str, set[str]] = {}
    for alike in (*sets, *shared.values()):
        for member in alike:
            found.setdefault(member, set()).update(alike)
    return found

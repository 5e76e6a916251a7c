"""Templates of word problems, 20 for training and 10 held out for each operation, and the words that fill them.

A template is ``(prompt, tail)``. The text of a problem is the filled prompt, the answer, a space and the filled tail.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    """Splits ``text`` at white space; an underscore becomes a space within a word."""
    return [word.replace("_", " ") for word in text.split()]


NAMES = _words("""
Ada Aiko Alma Amara Amir Anders Anika Anton Arlo Asha Astrid Atlas Aylin Bao Basil Beatriz Benno Bianca Bjorn Bruno Calla
Camilo Carmen Cato Cedric Celia Chiara Cleo Cora Cyrus Dalia Damir Daphne Darius Delia Devi Diego Dimitri Dora Edda Edwin
Eitan Elara Elias Elif Elio Eloise Emeka Emil Enzo Esme Esther Ezra Fadi Farah Felix Fern Fiona Flora Frida Gael Gemma Gideon
Gita Goran Greta Gustav Hadi Hana Hassan Hedda Heidi Henrik Hilda Hugo Ida Idris Ilona Imani Ines Ingrid Ioana Iris Isak Ivo
Jada Jalen Jamila Jasper Jin Joana Jonas Jorge Juno Kai Kamal Karin Kasper Keiko Kenji Kian Kira Klara Koji Lale Lars Layla
Leif Lena Leon Leona Liam Lida Linus Livia Lorenzo Luca Lucia Luna Maeve Magnus Malik Mara Marek Mariam Marta Mateo Maya Mei
Mila Milan Mina Mira Moritz Nadia Naomi Nestor Nia Nico Nils Nina Noa Noor Nora Odette Olaf Olga Omar Orla Oscar Otto Paloma
Pascal Paula Pavel Pedro Petra Pia Quentin Quinn Rafael Rania Ravi Remy Rhea Rosa Rowan Ruben Ruth Sami Sana Sasha Selma
Sigrid Silas Simone Sofia Soren Stella Sunil Suri Talia Tamar Tariq Tessa Theo Thora Tilda Timur Tomas Tove Uma Urban Vera
Viggo Viktor Vivian Wanda Wilma Xenia Yael Yara Yasmin Yosef Yuki Yusuf Zahra Zelda Zeno Zofia Zuri Captain_Fig Doctor_Moss
Professor_Plume Madame_Thistle Sir_Barnaby Granny_Wool Uncle_Birch Aunt_Clover the_badger the_beaver the_bear the_crane
the_crow the_deer the_dolphin the_duck the_eagle the_falcon the_ferret the_finch the_fox the_frog the_gecko the_goat the_goose
the_hare the_hedgehog the_heron the_horse the_jackal the_koala the_lemur the_lion the_llama the_lynx the_magpie the_marmot
the_mole the_moose the_mouse the_newt the_octopus the_otter the_owl the_panda the_parrot the_penguin the_pony the_puffin
the_rabbit the_raven the_robin the_seal the_sheep the_sloth the_sparrow the_squirrel the_stork the_swan the_tiger the_toad
the_turtle the_walrus the_weasel the_whale the_wolf the_wombat the_yak the_zebra the_baker the_barber the_captain
the_carpenter the_cook the_dancer the_doctor the_farmer the_gardener the_guard the_hiker the_judge the_librarian the_mayor
the_miller the_nurse the_painter the_pilot the_plumber the_sailor the_tailor the_teacher the_weaver
""")

OBJECTS = _words("""
acorns almonds anchors apples apricots arrows badges bagels balloons bananas bandages baskets beads beans beets bells belts
berries biscuits blankets blocks boats bolts books boots bottles bowls bracelets bricks brooms brushes buckets buns buttons
cakes cameras candles candies caps cards carrots chairs cherries chestnuts chisels clocks coats coins combs compasses cookies
corks crackers crayons crowns cups curtains cushions darts dates dice dolls doughnuts drums eggs envelopes erasers fans
feathers figs flags flowers flutes forks gems glasses gloves goggles grapes hammers hats helmets hooks horns jackets jars
kettles keys kites knives knots ladders ladles lamps lanterns leaves lemons lenses letters lids limes lockets locks magnets
mangoes maps marbles masks medals melons mirrors mittens mugs mushrooms nails napkins needles notebooks notes nuts oars olives
onions oranges paddles paintings pancakes papers peaches peanuts pearls pears pebbles pencils pens peppers photos pickles pies
pillows pins pipes planks plates plums postcards posters potatoes pots prunes pumpkins puzzles radishes rings rocks ropes
roses rulers saddles sandals saucers scarves screws seeds shells shirts shoes shovels socks spoons springs stamps stars
statues stickers stones straws strings tacks tapes tents thimbles tickets ties tiles tomatoes torches towels toys trays
trophies tulips turnips umbrellas vases walnuts watches wheels whistles
""")

PLACES = _words("""
the_market the_library the_harbour the_school the_garden the_workshop the_museum the_station the_bakery the_theatre
the_orchard the_village_hall the_camp the_farm the_office the_attic the_cellar the_lighthouse the_bookshop the_playground
""")

CONTAINERS = _words("""
box bag basket crate drawer jar chest bucket tin sack case tray barrel bowl pouch cart shelf bin trunk hamper
""")

GROUPS = _words("""
team class family club crew band choir troop squad guild circle party league union council chorus patrol unit cast group
""")

# Fields: n1, n2, name, name2, object, place, container, group.
TRAIN = {
    "+": [
        ("{name} has {n1} {object}. {name2} brings {n2} more. Together they have ", "{object}."),
        ("There are {n1} {object} at {place}. {name} adds {n2} {object}. The number there is now ", "{object}."),
        ("{name} found {n1} {object} in the morning and {n2} in the evening. In all {name} found ", "{object}."),
        ("A {container} holds {n1} {object}. {n2} more are put in. The {container} now holds ", "{object}."),
        ("{name} bought {n1} {object} at {place} and {name2} bought {n2}. Between them they bought ", "{object}."),
        ("On Monday {name} counted {n1} {object}, on Tuesday {n2}. Over both days that makes ", "{object}."),
        ("{name} owns {n1} {object}. For a birthday come {n2} more. Now {name} owns ", "{object}."),
        ("One {container} has {n1} {object}, another has {n2}. Both contain ", "{object}."),
        ("{n1} {object} were sold before lunch and {n2} after it. The day's sales were ", "{object}."),
        ("The {group} collected {n1} {object}; {name} gave {n2} on top. The {group} ends up with ", "{object}."),
        ("{name} carried {n1} {object} to {place}, then went back for {n2}. {name} carried ", "{object}."),
        ("After making {n1} {object}, {name} made {n2} further ones. The work came to ", "{object}."),
        ("{name2} lent {name} {n2} {object}, and {name} had {n1} already. That gives {name} ", "{object}."),
        ("There were {n1} {object} on the table and {n2} under it. Counting both, there were ", "{object}."),
        ("{name} packed {n1} {object}. {name2} packed {n2}. The luggage has ", "{object}."),
        ("A truck brings {n1} {object} to {place}. A second one brings {n2}. Delivered are ", "{object}."),
        ("{name} drew {n1} {object} on one page and {n2} on the next. The drawings show ", "{object}."),
        ("{name} won {n1} {object} and then {n2} more. The winnings are ", "{object}."),
        ("First {n1} {object} arrived, later {n2}. The total that arrived is ", "{object}."),
        ("{name} saved {n1} {object} last year and {n2} this year. Saved so far are ", "{object}."),
    ],
    "-": [
        ("{name} has {n1} {object} and gives {n2} to {name2}. {name} keeps ", "{object}."),
        ("There were {n1} {object} at {place}. {n2} were taken away. What is left is ", "{object}."),
        ("A {container} held {n1} {object} until {name} removed {n2}. Inside remain ", "{object}."),
        ("{name} baked {n1} {object}; the {group} ate {n2}. Still there are ", "{object}."),
        ("Of {n1} {object}, {n2} broke. Whole ones number ", "{object}."),
        ("{name} started with {n1} {object} and lost {n2}. {name} is left with ", "{object}."),
        ("{n1} {object} hung on the wall. {n2} fell down. Hanging there now are ", "{object}."),
        ("{name} needs {n1} {object} and has {n2}. Missing are ", "{object}."),
        ("{name} has {n1} {object}, {name2} has {n2}. {name} is ahead by ", "{object}."),
        ("The {group} ordered {n1} {object} but sent back {n2}. Kept were ", "{object}."),
        ("From {n1} {object} {name} sold {n2} at {place}. Unsold are ", "{object}."),
        ("{name} borrowed {n1} {object} and has returned {n2}. Still to return are ", "{object}."),
        ("A row of {n1} {object} is cut by {n2}. The row now counts ", "{object}."),
        ("{n1} {object} were planned and {n2} are done. To do are ", "{object}."),
        ("{name} picked {n1} {object} and dropped {n2} on the way. {name} came home with ", "{object}."),
        ("In the {container} were {n1} {object}. {name2} used {n2}. The {container} still has ", "{object}."),
        ("{n1} {object} stood at {place} before {n2} were moved. Standing there are ", "{object}."),
        ("{name} had {n1} {object} in spring and {n2} fewer in autumn. In autumn {name} had ", "{object}."),
        ("Out of {n1} {object} the {group} painted {n2}. Unpainted stayed ", "{object}."),
        ("{name} hid {n1} {object}; {name2} found {n2} of them. Hidden still are ", "{object}."),
    ],
    "*": [
        ("Each {container} has {n2} {object}. In {n1} such containers there are ", "{object}."),
        ("{name} fills {n1} rows with {n2} {object} each. That makes ", "{object}."),
        ("Every member of the {group} brings {n2} {object}. With {n1} members that gives ", "{object}."),
        ("{name} walks to {place} {n1} times and carries {n2} {object} each time. Carried are ", "{object}."),
        ("{n1} shelves hold {n2} {object} apiece. Altogether they hold ", "{object}."),
        ("A page shows {n2} {object}. {n1} pages show ", "{object}."),
        ("{name} makes {n2} {object} a day. After {n1} days the count is ", "{object}."),
        ("One ticket buys {n2} {object}. For {n1} tickets {name} gets ", "{object}."),
        ("{n1} children have {n2} {object} each. The children have ", "{object}."),
        ("{name} stacks {n1} layers of {n2} {object}. The stack contains ", "{object}."),
        ("A carton takes {n2} {object}. {n1} full cartons take ", "{object}."),
        ("At {place} stand {n1} tables with {n2} {object} on each. On the tables are ", "{object}."),
        ("{name} repeats a set of {n2} {object} {n1} times. Used are ", "{object}."),
        ("{n1} wagons carry {n2} {object} each. The train carries ", "{object}."),
        ("A garden has {n1} beds with {n2} {object} in each. It has ", "{object}."),
        ("{name} sews {n2} {object} on each of {n1} coats. Sewn on are ", "{object}."),
        ("Every week {name2} sends {n2} {object}. In {n1} weeks arrive ", "{object}."),
        ("{n1} walls are decorated with {n2} {object} each. The decoration takes ", "{object}."),
        ("A pack contains {n2} {object}, and {name} buys {n1} packs. {name} buys ", "{object}."),
        ("{n1} teams receive {n2} {object} each. Handed out are ", "{object}."),
    ],
    "/": [
        ("{name} shares {n1} {object} equally among {n2} friends. Each friend gets ", "{object}."),
        ("{n1} {object} are split evenly over {n2} containers. Each {container} holds ", "{object}."),
        ("The {group} of {n2} divides {n1} {object} fairly. Everyone receives ", "{object}."),
        ("{name} lays {n1} {object} in {n2} equal rows. A row has ", "{object}."),
        ("{n1} {object} fill {n2} pages, all alike. On each page are ", "{object}."),
        ("In {n2} days {name} made {n1} {object}, the same number daily. A day yields ", "{object}."),
        ("{n2} equal parcels contain {n1} {object}. One parcel contains ", "{object}."),
        ("{name} hands {n1} {object} to {n2} visitors at {place}, each the same. A visitor takes ", "{object}."),
        ("{n1} {object} are cut into {n2} equal heaps. One heap is ", "{object}."),
        ("A load of {n1} {object} goes on {n2} carts evenly. Each cart bears ", "{object}."),
        ("{n2} tables share {n1} {object} equally. A table is given ", "{object}."),
        ("{name} plants {n1} {object} in {n2} beds of one size. Each bed gets ", "{object}."),
        ("With {n2} shelves for {n1} {object}, filled alike, one shelf takes ", "{object}."),
        ("{n1} {object} are dealt to {n2} players. Every player holds ", "{object}."),
        ("{name} spreads {n1} {object} over {n2} weeks evenly. That is, each week, ", "{object}."),
        ("{n2} rooms need {n1} {object} in equal measure. For one room there are ", "{object}."),
        ("{name2} sorts {n1} {object} into {n2} equal piles. A pile counts ", "{object}."),
        ("{n1} {object} are strung on {n2} cords, the same on each. A cord carries ", "{object}."),
        ("From {n1} {object} come {n2} identical bundles. A bundle is made of ", "{object}."),
        ("{n2} boats bring {n1} {object}, each as many. A boat brings ", "{object}."),
    ],
}

VALID = {
    "+": [
        ("{name} keeps {n1} {object} upstairs and {n2} downstairs. The house has ", "{object}."),
        ("To {n1} {object} the {group} adds {n2}. The sum is ", "{object}."),
        ("{name2} sees {n1} {object} on the left and {n2} on the right. In view are ", "{object}."),
        ("{n1} {object} are red and {n2} are blue. Red and blue ones make ", "{object}."),
        ("{name} opened {n1} {object} and {name2} opened {n2}. Opened were ", "{object}."),
        ("At {place} {n1} {object} were on show; {n2} joined them. On show are ", "{object}."),
        ("The {container} gets {n1} {object} from {name} and {n2} from {name2}. It gets ", "{object}."),
        ("{name} repaired {n1} {object} in May and {n2} in June. Repaired were ", "{object}."),
        ("{n1} {object} plus another {n2} were washed. Clean are ", "{object}."),
        ("{name} had {n1} {object} and inherited {n2}. This leaves {name} with ", "{object}."),
    ],
    "-": [
        ("{n1} {object} were in stock and {n2} were shipped. The stock is ", "{object}."),
        ("{name} wrapped {n2} of {n1} {object}. Unwrapped are ", "{object}."),
        ("The wind took {n2} of the {n1} {object} at {place}. Remaining are ", "{object}."),
        ("{name} traded away {n2} {object} out of {n1}. Not traded are ", "{object}."),
        ("Of the {n1} {object} in the {container}, {n2} are wet. Dry are ", "{object}."),
        ("{name2} has {n2} {object} where {name} has {n1}. The difference is ", "{object}."),
        ("{n1} {object} were lit and {n2} went out. Still lit are ", "{object}."),
        ("The {group} had {n1} {object} and donated {n2}. It has ", "{object}."),
        ("{name} counted {n1} {object} and then crossed out {n2}. The list has ", "{object}."),
        ("After {n2} of {n1} {object} were packed, waiting to be packed were ", "{object}."),
    ],
    "*": [
        ("{n1} drawers contain {n2} {object} each. The cabinet contains ", "{object}."),
        ("{name} buys {n2} {object} on each of {n1} visits to {place}. Bought are ", "{object}."),
        ("Each floor has {n2} {object}, and there are {n1} floors. The tower has ", "{object}."),
        ("{n1} guests bring {n2} {object} each. The host counts ", "{object}."),
        ("A bundle is {n2} {object}. {name} ties {n1} bundles out of ", "{object}."),
        ("The {group} meets {n1} times and uses {n2} {object} at each meeting. Used up are ", "{object}."),
        ("{n1} trees bear {n2} {object} each. The harvest is ", "{object}."),
        ("{name} knits {n1} blankets with {n2} {object} on each. Needed are ", "{object}."),
        ("{n1} nets hold {n2} {object} each. In the nets are ", "{object}."),
        ("Every {container} weighs as much as {n2} {object}. {n1} of them weigh as much as ", "{object}."),
    ],
    "/": [
        ("{n1} {object} are packed in {n2} equal suitcases. A suitcase has ", "{object}."),
        ("{name} gives {n1} {object} to {n2} neighbours in equal shares. A share is ", "{object}."),
        ("{n2} drawers take {n1} {object} evenly. A drawer takes ", "{object}."),
        ("The {group} sets {n1} {object} on {n2} tables alike. Each table shows ", "{object}."),
        ("{n1} {object} last {n2} days at a steady rate. Daily use is ", "{object}."),
        ("{name} divides {n1} {object} by {n2} colours, equally many of each. Of one colour there are ", "{object}."),
        ("At {place} {n2} stalls sell {n1} {object}, each the same number. A stall sells ", "{object}."),
        ("{n2} nets caught {n1} {object}, equally many in each. One net caught ", "{object}."),
        ("{name2} arranges {n1} {object} in {n2} equal circles. One circle has ", "{object}."),
        ("{n1} {object} are poured into {n2} jars evenly. A jar gets ", "{object}."),
    ],
}

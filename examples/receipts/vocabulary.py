"""The words that receipts are made of."""

TOTAL_LABELS = ("total", "TOTAL", "sum", "to pay")

_NAMES = """
almonds apples apron avocado bacon bagel balloon banana barley basil basket batter beans beef beer bell berries
biscuit blanket bleach bolts bowl bread broom brush bucket butter button cabbage cable cake candle candy canvas
caramel card carrots cashews celery cereal chain chalk charger cheese cherries chicken chips chisel cider cinnamon
clock cloth cocoa coconut cod coffee comb cookies cord corn couscous crackers cream cumin cup curry dates detergent
dill donuts drill duster eggs envelope eraser fennel figs file flour folder fork foil frame fudge funnel garlic gin
ginger glass gloves glue granola grapes grater gravy ham hammer hanger hazelnuts herring hinge honey hooks hummus ice
ink jam jar juice kale kettle ketchup kiwi knife ladle lamp leeks lemon lentils lettuce lighter lime linen lobster
lock magnet mango maple marker mat melon milk mint mirror mop muesli muffin mug mussels mustard nails napkins needle
noodles notebook nutmeg nuts oats oil olives onions orange oregano oysters paint pan paper parsley pasta peach peanuts
pears peas pecans pencil pepper pickles pie pillow pins pizza plate pliers plums popcorn pork potatoes prawns pumpkin
quiche quinoa radish raisins razor ribbon rice rolls rope rosemary rug ruler rum sage salad salmon salt sauce saw
scarf scissors screws shampoo shovel sieve soap socks soda sorbet soup spinach sponge spoon stamps stapler steak
string sugar sushi syrup tacos tahini tape tea thread thyme tiles tissues toast tofu tomato tongs towel tray trout
tuna turkey turnip twine vanilla vase vinegar wafers walnuts washer water wax whisk wine wire wrench yams yeast yogurt
zest
"""
NAMES = tuple(_NAMES.split())

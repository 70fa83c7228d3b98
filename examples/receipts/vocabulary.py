"""The words that receipts are made of."""

TOTAL_LABELS = ("total", "TOTAL", "sum", "to pay")

_NAMES = """
almonds apples avocado bacon bagels bananas barley basil beans beef berries biscuits bread broccoli butter cabbage
cake candles carrots cashews celery cereal cheese cherries chicken chips chocolate cider cinnamon coconut coffee
cookies corn crackers cream cumin curry dates detergent donuts eggs fennel figs flour garlic ginger grapes gravy ham
hazelnuts herring honey hummus jam juice kale ketchup kiwi lamb leeks lemons lentils lettuce lobster mango maple melon
milk mint muesli muffins mushrooms mussels mustard napkins noodles nutmeg oats oil olives onions oranges oregano
oysters pasta peaches peanuts pears peas pepper pickles pizza plums popcorn pork potatoes prawns pumpkin quinoa radish
raisins rice rosemary salad salmon salt sauce shampoo soap soup spinach sponge steak sugar sushi syrup tacos tea thyme
tissues tofu tomatoes trout tuna turkey vanilla vinegar walnuts water yogurt
"""
NAMES = tuple(_NAMES.split())

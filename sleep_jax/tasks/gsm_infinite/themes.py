"""The names of the worlds: three small core vocabularies and their noise.

Core and noise names never meet. In terse text a name is its last word, in
lower case, so the last words of the names of a theme are distinct; noise names
are there told apart by that word alone, in prose by a qualifier too.
"""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Theme:
  """The words of one kind of world.

  Attributes:
    places: groups of places; a problem takes its places from one group.
    things: groups of things, likewise.
    total: what a total over the things of a place counts.
    attribute: what the average of a thing counts.
    attribute_total: what a total of the attribute counts.
    noise_places: places that only noise statements speak of.
    noise_things: things that only noise statements speak of.
  """

  places: tuple[tuple[str, ...], ...]
  things: tuple[tuple[str, ...], ...]
  total: str
  attribute: str
  attribute_total: str
  noise_places: tuple[str, ...]
  noise_things: tuple[str, ...]


def _names(lines: str) -> tuple[tuple[str, ...], ...]:
  return tuple(
    tuple(name.strip() for name in line.split(","))
    for line in lines.strip().splitlines()
  )


# 20 of them: with 32 nouns each, 640 noise places and 640 noise things.
_QUALIFIERS = tuple(
  """northern southern eastern western inner outer upper ancient modern hidden
  famous humble gentle noisy bright misty frozen sunny crimson violet""".split()
)


def _qualified(nouns: Iterable[str]) -> tuple[str, ...]:
  """Names of two words; capitalised as the nouns are."""
  return tuple(
    f"{word.title() if noun.istitle() else word} {noun}"
    for word in _QUALIFIERS
    for noun in nouns
  )


def _terse(theme: Theme) -> Theme:
  def shorten(names):
    return tuple(dict.fromkeys(name.split()[-1].lower() for name in names))

  return dataclasses.replace(
    theme,
    places=tuple(shorten(group) for group in theme.places),
    things=tuple(shorten(group) for group in theme.things),
    noise_places=shorten(theme.noise_places),
    noise_things=shorten(theme.noise_things),
  )


_NOISE_PLACES = _qualified(
  """Glacier Canyon Plateau Desert Dune Oasis Delta Lagoon Atoll Reef Fjord
  Peninsula Island Archipelago Strait Gulf Cavern Grotto Gorge Ravine Cliff
  Summit Volcano Crater Geyser Prairie Savanna Steppe Tundra Jungle Orchard
  Meadow""".split()
)

_PROSE = {
  "zoo": Theme(
    places=_names("""
      Lone Pine, Otter Lake, Granite Hill, Amber Marsh, Willow Creek
      Harbor Aquarium, Red Barn, Northern Zoo, Clover Ranch, Summer Circus
    """),
    things=_names("""
      adult fox, adult wolf, adult elk, adult bear, adult hare
      adult owl, adult crow, adult heron, adult hawk, adult finch
    """),
    total="adult animals",
    attribute="newborn children",
    attribute_total="newborn animal children",
    noise_places=_NOISE_PLACES,
    noise_things=_qualified(
      """gecko newt toad turtle viper python iguana skink salmon trout carp eel
      shark squid crab shrimp beetle moth wasp cricket otter badger lynx lemur
      tapir bison camel llama stork gull puffin penguin""".split()
    ),
  ),
  "schools": Theme(
    places=_names("""
      Stone Harbor, Green Valley, West Haven, Long Bridge, Silver Bay
      Lower Falls, King Crossing, Maple Grove, Mill Landing, Eagle Heights
    """),
    things=_names("""
      village kindergarten, private academy, art college, music conservatory,\
 trade institute
      boarding school, public university, evening seminary, sports gymnasium,\
 language lyceum
    """),
    total="schools",
    attribute="teachers",
    attribute_total="teachers from all schools",
    noise_places=_NOISE_PLACES,
    noise_things=_qualified(
      """nursery playgroup creche polytechnic workshop studio atelier dojo
      observatory clinic laboratory library archive museum guild fellowship
      internship bootcamp retreat camp chapter club circle league choir
      orchestra ensemble troupe brigade squad faculty department""".split()
    ),
  ),
  "festivals": Theme(
    places=_names("""
      Silver Reel, Open Curtain, Midnight Screen, Golden Lantern, Paper Moon
      Winter Gala, Coastal Premiere, Royal Projector, Grand Marquee,\
 Old Velvet
    """),
    things=_names("""
      slow drama, loud comedy, space thriller, silent opera, street musical
      desert epic, family cartoon, courtroom mystery, war documentary,\
 ghost romance
    """),
    total="movies",
    attribute="nominations",
    attribute_total="movie nominations",
    noise_places=_NOISE_PLACES,
    noise_things=_qualified(
      """farce satire parody tragedy biopic noir whodunit caper heist chiller
      slasher fantasy fable saga chronicle newsreel travelogue montage short
      serial prequel sequel remake pilot anthology melodrama swashbuckler
      burlesque pantomime operetta pageant vignette""".split()
    ),
  ),
}

# By style and name.
THEMES = {
  "prose": _PROSE,
  "terse": {name: _terse(theme) for name, theme in _PROSE.items()},
}

"""The fixed vocabularies of the tasks: short common words that each become one token."""

from __future__ import annotations

# Items of lists and values of tables.
LIST_WORDS: tuple[str, ...] = tuple(
    """
    red blue green black white pink gold gray moon sun star sky rain snow wind fire cat dog cow pig fox bear
    wolf fish bird duck tree leaf rose seed root salt rice corn milk bread cake apple tin iron coal sand rock
    lake river hill road town door wall roof table chair lamp clock book pen ring coat hat shoe ship drum bell
    """.split()  # noqa: SIM905 (easier to read than a list of strings)
)

# Keys of tables and files.
KEY_WORDS: tuple[str, ...] = tuple(
    """
    able back ball band bank base belt bench boat body bone bowl box brush camp card care cart case chain
    city class cloud club coin cold color cook cost count cover crop cup dark date deep desk dish dust
    east edge egg face farm fast field film flat floor foot form game gate gift glass goal grass hand
    head heart heat home horse hour ice jar job key king land law line list lock map mark mask meal mind
    mouse name neck nest net night nose note oil
    page park path pipe plan plate port post
    """.split()  # noqa: SIM905 (easier to read than a list of strings)
)

ALL_WORDS = LIST_WORDS + KEY_WORDS

FIRST_NAMES: tuple[str, ...] = tuple(
    """
    Ann Ben Carl Dora Emma Finn Gina Hugo Ida Jack Kate Leo Mia Nina Omar Paul Rosa Sam Tina Uma Vera Will
    Yara Zoe
    """.split()  # noqa: SIM905 (easier to read than a list of strings)
)

LAST_NAMES: tuple[str, ...] = tuple(
    """
    Lee Smith Brown Jones Young King Hall Wood Clark Lewis Adams Baker Carter Evans Foster Green Hill Moore
    Parker Reed Stone Turner Ward White
    """.split()  # noqa: SIM905 (easier to read than a list of strings)
)

CITIES: tuple[str, ...] = tuple(
    """
    Oslo Paris Rome Berlin Madrid Lisbon Vienna Prague Dublin London Athens Cairo Delhi Tokyo Lima Boston
    Denver Milan Geneva Warsaw
    """.split()  # noqa: SIM905 (easier to read than a list of strings)
)

JOBS: tuple[str, ...] = tuple(
    """
    nurse teacher doctor baker driver farmer lawyer painter pilot singer writer waiter cook judge builder
    tailor dentist plumber sailor guard
    """.split()  # noqa: SIM905 (easier to read than a list of strings)
)

"""What all tables have: names of columns."""

from litpeft.core.errors import DataError, quoted


def checked_names(names: list[str], where: str) -> list[str]:
    """Returns the names of a table's columns; raises DataError if one is empty or stands twice."""
    names = [name.strip() for name in names]
    if "" in names:
        what = f"column {names.index('') + 1} of {len(names)} has no name"
        hint = "the first row holds the names of the columns: give it one, or remove it"
        raise DataError(what, where=where, hint=hint)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two columns are called {quoted(twice)}", where=where, hint="rename one of them")
    return names

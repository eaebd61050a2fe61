"""Every bad input is refused in words that name the argument, what was got and what to do."""

import pytest

from bad_inputs import BAD_INPUTS, BadInput, message


@pytest.mark.parametrize("row", BAD_INPUTS, ids=lambda row: row.name.replace(" ", "-"))
def test_bad_input_is_refused_in_words_that_help(row: BadInput) -> None:
    with pytest.raises(row.error) as caught:
        row.call()
    text = message(caught.value)
    missing = [words for words in row.words if words not in text]
    assert not missing, f"{missing} not in: {text}"


def test_bad_inputs_have_names_of_their_own() -> None:
    assert len({row.name for row in BAD_INPUTS}) == len(BAD_INPUTS) >= 40

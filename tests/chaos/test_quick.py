"""The campaign itself, small."""

from pathlib import Path

import pytest
from chaos import campaign


@pytest.mark.soak
def test_a_small_campaign_loses_nothing(tmp_path: Path) -> None:
    found = campaign.main(["--quick", "--json", str(tmp_path / "chaos.json")])
    assert found["chaos/kills_survived_bit_identically"]["value"] == 4
    assert found["chaos/kills_inside_a_save"]["value"] == 2
    assert (tmp_path / "chaos.json").is_file()

"""What every test shares: a signing key of its own, no crash points, and patience with slow machines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Deadlines measure the machine, not the code; without a database a failure never depends on the last run.
hypothesis.settings.register_profile("glasshouse", deadline=None, database=None, max_examples=50)
hypothesis.settings.load_profile("glasshouse")


@pytest.fixture(scope="session", autouse=True)
def glasshouse_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep keys and heads out of the user's home, and crash points out of the test process."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSHOUSE_HOME", str(home))
        patch.delenv("GLASSHOUSE_CRASH_AT", raising=False)
        patch.delenv("GLASSHOUSE_CRASH_LIST", raising=False)
        yield home


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Small models are slower on two threads."""
    import torch  # not above: half of the tests do without, and start sooner

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Tests that grow models take longest; begun first, they do not leave one process working alone at the end.
LONGEST = ("planted", "recipes/zoo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the folders whose tests grow models first."""
    root = Path(__file__).parent
    items.sort(key=lambda item: not item.path.relative_to(root).as_posix().startswith(LONGEST))

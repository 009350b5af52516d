"""The processor's name, from what different systems say of it."""

from __future__ import annotations

from hasten.bench.processor import name_in, processor_name


def test_x86_has_a_name() -> None:
    assert (
        name_in("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD  EPYC 9R14\n\nprocessor\t: 1")
        == "AMD EPYC 9R14"
    )


def test_arm64_has_numbers() -> None:
    listed = "processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\nCPU part\t: {}\nCPU revision\t: 1\n"
    assert name_in(listed.format("0xd0c")) == "Neoverse N1"
    assert name_in(listed.format("0x999")) == "arm64 processor 0x41:0x999"


def test_others_say_nothing() -> None:
    assert name_in("") is None and name_in("processor\t: 0\nisa\t: rv64imafdc\n") is None
    assert processor_name()

"""Options of the whole suite (pytest reads them only from the root)."""


def pytest_addoption(parser):
    parser.addoption("--real", metavar="DIR", help="folder with a small pretrained model and real preference pairs")

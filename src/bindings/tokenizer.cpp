// Python: pliant._core.Tokenizer and TokenStream.

#include "../core/tokenizer/tokenizer.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../core/error.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace pliant {
namespace {

// The UTF-8 of a str. A lone surrogate has none.
std::string_view utf8(nb::str text) {
    Py_ssize_t bytes = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &bytes);
    if (!data) {
        if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) throw nb::python_error();
        PyErr_Clear();
        throw UsageError(
            "the text holds a lone surrogate, which is no character; replace it first, for example "
            "with text.encode('utf-8', 'replace').decode()");
    }
    return {data, static_cast<size_t>(bytes)};
}

nb::str to_str(const std::string& text) {
    PyObject* str =
        PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), nullptr);
    if (!str) throw nb::python_error();
    return nb::steal<nb::str>(str);
}

uint32_t to_id(nb::handle item) {
    // Through __index__, so that numpy's integers are welcome and floats are not.
    const nb::object index = nb::steal(PyNumber_Index(item.ptr()));
    if (!index.is_valid()) throw nb::python_error();
    int overflow = 0;
    const long long id = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (id < 0 || id > 0xFFFFFFFFLL || overflow) {
        throw UsageError(std::string(nb::str(index).c_str()) + " is not a token id");
    }
    return static_cast<uint32_t>(id);
}

nb::list encode(const Tokenizer& self, nb::str text, bool add_special, bool parse_special) {
    const std::string_view bytes = utf8(text);
    std::vector<uint32_t> ids;
    {
        nb::gil_scoped_release release;
        ids = self.encode(bytes, add_special, parse_special);
    }
    nb::list list = nb::steal<nb::list>(PyList_New(static_cast<Py_ssize_t>(ids.size())));
    if (!list.is_valid()) throw nb::python_error();
    for (size_t i = 0; i < ids.size(); ++i) {
        PyObject* id = PyLong_FromUnsignedLong(ids[i]);
        if (!id) throw nb::python_error();
        PyList_SetItem(list.ptr(), static_cast<Py_ssize_t>(i), id);
    }
    return list;
}

nb::str decode(const Tokenizer& self, nb::iterable ids, bool skip_special) {
    std::vector<uint32_t> numbers;
    for (nb::handle item : ids) numbers.push_back(to_id(item));
    std::string text;
    {
        nb::gil_scoped_release release;
        text = self.decode(numbers, skip_special);
    }
    return to_str(text);
}

}  // namespace

void init_tokenizer(nb::module_& m) {
    nb::class_<TokenStream>(m, "TokenStream",
                            "Decodes token after token; gives out whole characters only.")
        .def(
            "push", [](TokenStream& self, nb::handle id) { return to_str(self.push(to_id(id))); },
            "id"_a, nb::sig("def push(self, id: int) -> str"),
            "The characters that this token completes; maybe none.")
        .def(
            "flush", [](TokenStream& self) { return to_str(self.flush()); },
            "What is still held back, as U+FFFD; the stream then begins anew.");

    nb::class_<Tokenizer>(
        m, "Tokenizer",
        "Text to token ids and back, from a tokenizer.bin (docs/tokenizer.md), which is mapped.\n\n"
        "Any number of threads may use one. Raises FormatError for a broken file, when it is\n"
        "opened or when the broken part is used, and UsageError for arguments without a meaning.")
        .def(
            "__init__",
            [](Tokenizer* self, nb::str path) { new (self) Tokenizer(std::string(utf8(path))); },
            "path"_a)
        .def("encode", &encode, "text"_a, "add_special"_a = false, "parse_special"_a = true,
             nb::sig("def encode(self, text: str, add_special: bool = False, "
                     "parse_special: bool = True) -> list[int]"),
             "The ids of a text. add_special: with the tokens that the model wants in front and\n"
             "behind. parse_special=False: special tokens spelled out in the text are plain text.\n"
             "UsageError if the text holds a lone surrogate.")
        .def("decode", &decode, "ids"_a, "skip_special"_a = false,
             nb::sig("def decode(self, ids: collections.abc.Iterable[int], "
                     "skip_special: bool = False) -> str"),
             "The text of ids. Ids without a token give nothing. UsageError if one is negative.")
        .def(
            "token_bytes",
            [](const Tokenizer& self, nb::handle id) {
                const std::string bytes = self.token_bytes(to_id(id));
                return nb::bytes(bytes.data(), bytes.size());
            },
            "id"_a, nb::sig("def token_bytes(self, id: int) -> bytes"),
            "The bytes that one token stands for, which need not be whole characters.\n"
            "UsageError if id >= vocab_size.")
        .def(
            "id_of",
            [](const Tokenizer& self, nb::str token) -> nb::object {
                const auto id = self.id_of(utf8(token));
                return id ? nb::object(nb::int_(*id)) : nb::object(nb::none());
            },
            "token"_a, nb::sig("def id_of(self, token: str) -> int | None"),
            "The id of a token as tokenizer.json spells it.")
        .def(
            "is_special",
            [](const Tokenizer& self, nb::handle id) { return self.is_special(to_id(id)); }, "id"_a,
            nb::sig("def is_special(self, id: int) -> bool"))
        .def(
            "stream",
            [](std::shared_ptr<Tokenizer> self, bool skip_special) {
                return TokenStream(std::move(self), skip_special);
            },
            "skip_special"_a = false,
            nb::sig("def stream(self, skip_special: bool = False) -> TokenStream"),
            "A decoder for tokens that come one by one.")
        .def_prop_ro("vocab_size", &Tokenizer::vocab_size,
                     "One more than the highest id that has a token.")
        .def_prop_ro("resident_bytes", &Tokenizer::resident_bytes,
                     "Bytes in memory now: resident pages of the mapped file, and the object.");
}

}  // namespace pliant

// Makes calls that another process has written down, over a copy of what they point to. Built with `STEP` naming step.cpp.
//
// A file has parts: bytes, and which of them are addresses in other parts. The last one is the calls. All parts are written
// to standard output as the calls leave them, behind a line that names the instruction set.

#include STEP

#include <cstdio>

extern "C" void hasten_sample(void *, int64_t, int64_t, float *, float *, void *);

namespace {

enum Name : int64_t { LINEAR, FORWARD, CHAIN, SAMPLE };
struct Call {
    Name name;
    int64_t number[9];

    template <class T>
    T *at(int argument) const {
        return reinterpret_cast<T *>(number[argument]);
    }
    void make(void *team) const {
        switch (name) {
            case LINEAR:
                return hasten_linear(at<Linear>(0), team, number[1], at<float>(2), at<float>(3), at<float>(4));
            case FORWARD:
                if (hasten_forward(at<Model>(0), team, at<Batch>(1), -1) != at<Model>(0)->layers) std::abort();
                return;
            case CHAIN:
                hasten_chain(at<Model>(0), team, at<Span>(1), number[2], number[3], number[4], number[5], 0.0f, at<int64_t>(6),
                             at<float>(7));
                return;
            case SAMPLE:
                return hasten_sample(at<void>(0), number[1], number[2], at<float>(3), at<float>(4), at<void>(5));
        }
    }
};
struct Address {
    int64_t at, part, offset;
};

template <class T>
std::vector<T> taken(int64_t count) {
    std::vector<T> values(count);
    if (std::fread(values.data(), sizeof(T), count, stdin) != static_cast<size_t>(count)) std::abort();
    return values;
}

}  // namespace

int main() {
    std::vector<std::vector<char>> parts;
    std::vector<std::vector<Address>> addresses;
    for (int64_t left = taken<int64_t>(1)[0]; left; --left) {
        const auto sizes = taken<int64_t>(2);
        parts.push_back(taken<char>(sizes[0]));
        addresses.push_back(taken<Address>(sizes[1]));
    }
    for (size_t part = 0; part < parts.size(); ++part)
        for (const Address &address : addresses[part]) {
            const char *to = parts[address.part].data() + address.offset;
            std::memcpy(parts[part].data() + address.at, &to, sizeof to);
        }
    void *team = hasten_team(2);
    std::vector<Call> calls(parts.back().size() / sizeof(Call));
    std::memcpy(calls.data(), parts.back().data(), parts.back().size());
    for (const Call &call : calls) call.make(team);
    hasten_disband(team);
    std::printf("%s\n", hasten_kernels());
    for (const auto &part : parts) std::fwrite(part.data(), 1, part.size(), stdout);
}
